"""The pages say what the runs say, show code and figures that exist, and name real flags."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from statistics import fmean

import pytest

import data
import evaluate
import train_dpo
from plots.study import tables

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text(encoding="utf-8") for page in tables.PAGES}
README, RESULTS = PAGES.values()
STUDY = tables.read_study()
SENTENCES = [  # (page, sentence): {model: metric} stands for the mean over the seeds, 0.981
    (README, "exact answers falls from {SFT: exact} to {offline: exact}"),
    (README, "(`--nll-weight 1`): {offline + NLL: preferred} of the answers are preferred"),
    (RESULTS, "The SFT models have a gap of {SFT: gap} nats"),
    (README, "imitation of the chosen answers gets {imitation: preferred}"),
    (README, "{mistakes: preferred} of the answers are preferred, and {mistakes: exact} are exact"),
    (
        README,
        "{without the last term and the end: preferred} of the answers are preferred, and "
        "{without the last term and the end: exact} are exact",
    ),
    (README, "also help: {half wrong sums: preferred} are preferred"),
    (README, "{RLHF: preferred} of the answers are preferred, and {RLHF: exact} are exact"),
    (RESULTS, "and only {offline, smoothed: exact} are exact"),
    (RESULTS, "SFT models and β, {offline: exact} and {RLHF: exact} of the answers are exact"),
    (RESULTS, "as those of the generator nearly do (gap {SFT: gap})"),
    (RESULTS, "{offline: go on after the exact sum} pass the exact sum and go on"),
    (RESULTS, "{offline: overshoot} overshoot without ever being exact"),
    (RESULTS, "and {offline: stop short} stop short"),
    (RESULTS, "with gaps of {width 24: gap} and {width 96: gap} nats"),
    (RESULTS, "with five terms preferred, {five terms preferred: exact} of the answers are exact"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_study(page):
    assert tables.fill(PAGES[page], STUDY) == PAGES[page], "make publish writes them anew"
    assert "<!-- table" in PAGES[page]


@pytest.mark.parametrize("page, sentence", SENTENCES, ids=range(len(SENTENCES)))
def test_numbers_in_sentences_are_rounded_means_over_the_seeds(page, sentence):
    def mean(found):
        model, metric = found[1].split(": ")
        known = STUDY["collapse"] | next(iter(STUDY["interventions"].values()))
        runs = (known | tables.methods_of(STUDY) | tables.models_of(STUDY))[model]
        runs = [run | run.get("sampled", {}) | run.get("wrong", {}) for run in runs]
        return f"{fmean(run[metric] for run in runs):.3f}"

    assert re.sub(r"\{(.*?)\}", mean, sentence) in " ".join(page.split())


def test_numbers_of_single_seeds_and_parts_are_those_of_the_runs():
    without_kl, variants = STUDY["rlhf"]["without kl"], next(iter(STUDY["interventions"].values()))
    for runs in (without_kl, variants["four terms, cut"], variants["the end token alone"]):
        assert "{:.3f}, {:.3f} and {:.3f}".format(*map(tables.EXACT, runs)) in RESULTS
    assert min(map(tables.of_three_terms, without_kl)) > 0.99
    methods = tables.methods_of(STUDY)
    drift, excess = (
        fmean(run["kl parts"][part] for run in methods["online"])
        for part in ("preferred", "excess")
    )
    assert f"{drift:.3f} of their {excess:.3f} nats" in RESULTS
    ends = [
        tables.BETA * fmean(run["offline pairs"]["rejected"] for run in methods[name])
        for name in ("imitation", "offline")
    ]
    expected = "end at {:.1f}, and those of `offline` at {:.1f}".format(*ends).replace("-", "−")
    assert expected in " ".join(RESULTS.split())


def test_the_ceiling_of_the_chosen_reward_is_that_of_the_runs():
    runs = tables.methods_of(STUDY)["offline"]
    ceiling = tables.BETA * fmean(run["offline pairs"]["ceiling"] for run in runs)
    assert RESULTS.count(f"which is {ceiling:.2f} here") == 2


def test_the_readme_shows_the_loss_as_it_is():
    """All of dpo_loss but its docstring."""
    source = inspect.getsource(train_dpo.dpo_loss)
    docstring, lines = ast.parse(source).body[0].body[0], source.splitlines()
    shown = lines[: docstring.lineno - 1] + lines[docstring.end_lineno :]
    assert "```python\n" + "\n".join(shown) + "\n```" in README


def test_printed_equations_and_the_pair_are_those_of_the_command(capsys):
    for flags in ("--count 4", "--pairs --count 1"):
        data.main(data.parse_args(flags.split()))
        assert f"$ python data.py {flags}\n{capsys.readouterr().out}" in README


@pytest.mark.parametrize("label", evaluate.MODELS)
def test_make_and_the_readme_train_what_the_study_chose(label):
    """Each with the settings and the learning rate that the study found best for it."""

    def parsed(flags):
        return vars(train_dpo.parse_args(flags)) | {"out": None}

    settings = STUDY["methods"]["methods"][label]["settings"]
    chosen = parsed([f"--{flag}={value}" for flag, value in settings.items()])
    assert evaluate.label_of("", chosen) == label
    in_makefile = re.findall(r"^FLAGS_\w+ := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for shown in (["", *in_makefile], re.findall(r"python train_dpo\.py([^`\n#]*)", README)):
        assert chosen in [parsed(flags.split()) for flags in shown]


def test_every_figure_file_and_command_exists():
    for page, text in PAGES.items():
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / path).is_file(), path
        commands = re.findall(r"python (\w+)\.py([^`\n#>|]*)", text)
        for script, flags in commands:
            importlib.import_module(script).parse_args(flags.split())
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), module
        assert len(commands) > 8 or text is not README
    for path in re.findall(r"`([a-z_/]+\.(?:py|json))`", README + RESULTS):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "plots/study")), path
