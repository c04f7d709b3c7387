"""The pages say what the runs say, show code and figures that exist, and name real flags."""

import importlib
import inspect
import math
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
README, RESULTS = (" ".join(page.split()) for page in PAGES.values())
STUDY = tables.read_study()
VARIANTS = STUDY["interventions"] | STUDY["collapse"]
RUNS = tables.runs_of(STUDY) | {name: entry["runs"] for name, entry in VARIANTS.items()}
SENTENCES = [  # (page, sentence): {runs: metric} stands for the mean over the seeds, as 0.981
    (README, "DPO wins {offline: pairs won} of the pairs in the end"),
    (README, "and {offline: exact} of the answers stay exact"),
    (README, "makes wrong sums likely ({offline: wrong sums} of the answers)"),
    (README, "counts in the loss, {the last term: exact} are exact"),
    (
        README,
        "count, {the terms before the last: exact} are, and {the terms before the last: preferred}",
    ),
    (README, "nothing beside it, and it works ({mistakes: preferred} preferred)"),
    (README, "{offline + NLL: preferred} preferred (three seeds)"),
    (README, "exact answers to them ({SFT: held out} after SFT) were not memorised"),
    (README, "with label smoothing, {offline, smoothed: exact} are exact"),
    (
        RESULTS,
        "leaves {offline: exact} of the answers exact, and ends {offline: excess} nats above",
    ),
    (RESULTS, "{offline + KL: preferred} preferred, {offline + KL: exact} exact"),
    (RESULTS, "keeps the sums ({RLHF: exact})"),
    (RESULTS, "NLL beside the pairs ({offline + NLL: preferred} preferred;"),
    (RESULTS, "or plain imitation of the chosen side ({imitation: preferred})"),
    (RESULTS, "at best {five terms preferred: exact} are exact"),
    (RESULTS, "{the last term: exact} of the answers are exact. If the terms before it count"),
    (RESULTS, "{the terms before the last: exact} are, and {the terms before the last: preferred}"),
    (RESULTS, "({online: preferred}), but {online: drift} of their {online: excess} nats above"),
    (RESULTS, "about {offline: ceiling} here"),
    (RESULTS, "({offline + NLL: chosen}); those of `offline` end at {offline: chosen}"),
    (RESULTS, "end at {imitation: rejected}, and those of `offline` at {offline: rejected}"),
    (RESULTS, "is {offline, smoothed: z}, and {offline, smoothed: exact} of the answers are exact"),
    (RESULTS, "falls to {offline + NLL: lowest} exact"),
    (RESULTS, "{SFT: held out} are exact after SFT and {mistakes: held out}"),
    (RESULTS, "{SFT: largest} and {mistakes: largest}. The gap of SFT is {SFT: gap} nats"),
]


def metrics_of(run):
    """What the pages say of a run, by name."""
    metrics = run | run["sampled"] | {"held out": run["held out"]["exact"]}
    metrics |= {"wrong sums": metrics["parse_rate"] - metrics["exact"]}
    if parts := run.get("kl parts"):
        metrics |= {"excess": parts["excess"], "drift": parts["preferred"]}
    if "looks" in run:
        metrics |= {"lowest": min(look["exact"] for look in run["looks"])}
        metrics |= {"pairs won": run["looks"][-1]["pairs won"]}
    if sides := run.get("offline pairs"):
        metrics |= {side: tables.BETA * sides[side] for side in sides}
        metrics |= {"z": sides["chosen"] - sides["rejected"]}
    return metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_study(page):
    assert tables.fill(PAGES[page], STUDY) == PAGES[page], "make publish writes them anew"
    assert "<!-- table" in PAGES[page]


def filled(sentence):
    def mean(found):
        name, metric = found[1].split(": ")
        return f"{fmean(metrics_of(run)[metric] for run in RUNS[name]):.3f}".replace("-", "−")

    return re.sub(r"\{(.*?)\}", mean, sentence)


@pytest.mark.parametrize("page, sentence", SENTENCES, ids=range(len(SENTENCES)))
def test_numbers_in_sentences_are_rounded_means_over_the_seeds(page, sentence):
    assert filled(sentence) in page


def test_numbers_of_single_seeds_are_those_of_the_runs():
    exact = [f"{tables.EXACT(run):.3f}" for run in RUNS["RLHF without the KL"]]
    for page in (README, RESULTS):
        assert f"{', '.join(exact[:-1])} and {exact[-1]}" in page
    both = RUNS["offline + NLL"], RUNS["offline + KL"]
    assert f"offline + KL: {tables.paired(tables.PREFERRED, *both)}" in RESULTS
    rewards = STUDY["rlhf"]["rewards"]
    gaps = [of_seed["3 terms, exact"] - of_seed["3 terms, wrong"] for of_seed in rewards]
    assert f"gives exact ones {min(gaps):.1f} to {max(gaps):.1f} more than wrong ones" in RESULTS
    tried = STUDY["rlhf"]["methods"]["RLHF without the KL"]["tried"]
    (exact,) = [exact for settings, _, exact in tried if settings["lr"] == 3e-4]
    assert f"three times the rate leaves {exact:.3f} exact (seed 0)" in RESULTS
    assert min(run["kl parts"]["excess"] for run in RUNS["RLHF without the KL"]) > 3


def test_how_far_from_the_optimum_runs_with_a_noisy_judge_end():
    """Two betas for each kind, in the order of the table. The rate is the nearest on seed 0."""
    for entry in STUDY["judge"]["study"].values():
        optimum = entry["runs"][0]["optimum"]["preferred"]  # that of seed 0 is within 0.01
        distances = {abs(share - optimum): settings for settings, share, _ in entry["tried"]}
        assert entry["settings"] == distances[min(distances)]
    online, online_2, reference, _, rl, rl_2 = (
        f"{fmean(r['optimum']['preferred'] - tables.PREFERRED(r) for r in entry['runs']):.2f}"
        for entry in STUDY["judge"]["study"].values()
    )
    assert f"DPO ends {online} and {online_2} below the optimum, and RL {rl} and {rl_2}" in RESULTS
    assert f"stops short by {reference} at β = 0.3" in RESULTS
    assert f"online DPO ends {online} and {online_2} below the exact optimum" in RESULTS
    assert f"it ends {reference} below at β = 0.3" in RESULTS


def test_the_readme_shows_the_loss_as_it_is():
    """The body of dpo_loss, but for label smoothing, which is 0 by default."""
    lines = inspect.getsource(train_dpo.dpo_loss).split('"""')[2].strip("\n").splitlines()
    shown = [line for line in lines if "label_smoothing" not in line]
    shown.insert(3, "    losses = -F.logsigmoid(beta * z)")
    assert "\n".join(shown) + "\n```" in PAGES[tables.PAGES[0]]


def test_the_worked_pair_of_the_readme_adds_up():
    """Four log-probs, z, the loss and the share of its full pull, at beta = 0.8."""
    number = r"(-?[0-9.]+)"
    printed = re.search(
        rf"\[{number}, {number}\]\) tensor\(\[{number}, {number}\]", README
    ).groups()
    chosen, rejected, ref_chosen, ref_rejected = map(float, printed)
    z = chosen - ref_chosen - (rejected - ref_rejected)
    weight = 1 / (1 + math.exp(0.8 * z))
    assert f"z = {z:.2f}" in README and f"loss is {-math.log(1 - weight):.3f}" in README
    assert f"σ(−β z) = {weight:.3f}" in README


def test_printed_equations_and_the_pair_are_those_of_the_command(capsys):
    for flags in ("--count 4", "--pairs --count 1"):
        data.main(data.parse_args(flags.split()))
        assert f"$ python data.py {flags}\n{capsys.readouterr().out}" in PAGES[tables.PAGES[0]]


@pytest.mark.parametrize("label", tables.MADE)
def test_make_and_the_readme_train_what_the_study_chose(label):
    """Each with the settings and the learning rate that the study found best for it."""

    def parsed(flags):
        return vars(train_dpo.parse_args(flags)) | {"out": None}

    settings = STUDY["methods"]["methods"][label]["settings"]
    chosen = parsed([f"--{flag}={value}" for flag, value in settings.items()])
    assert evaluate.label_of(chosen) == label
    in_makefile = re.findall(r"^FLAGS_\w+ := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    in_readme = re.findall(r"python train_dpo\.py([^`\n#]*)", PAGES[tables.PAGES[0]])
    for shown in (["", *in_makefile], in_readme):
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
        assert len(commands) > 8 or page != tables.PAGES[0]
    for path in re.findall(r"`([a-z_/]+\.(?:py|json))`", README + RESULTS):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "plots/study")), path
