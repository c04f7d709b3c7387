"""The pages say what the runs say, show code and figures that exist, and name real flags."""

import ast
import inspect
import re
import statistics
from pathlib import Path

import pytest

import data
import evaluate
import train_dpo
import train_sft
from plots import figures, lesson, tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "plots" / "RESULTS.md").read_text(encoding="utf-8")
PUBLISHED = tables.read_published()
SCRIPTS = {
    "data.py": data,
    "train_sft.py": train_sft,
    "train_dpo.py": train_dpo,
    "evaluate.py": evaluate,
}


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda path: path.name)
def test_tables_are_those_of_the_published_runs(page):
    text = page.read_text(encoding="utf-8")
    assert tables.fill(text, PUBLISHED) == text, "make publish writes them anew"
    assert "<!-- table" in text


def test_numbers_in_sentences_are_rounded_means_over_the_seeds():
    runs = tables.published_runs(PUBLISHED)
    mean = {
        (model, metric): f"{statistics.mean(run['sampled'][metric] for run in runs[model]):.2f}"
        for model in runs
        for metric in ("exact", "preferred")
    }
    for sentence in (
        f"exact answers falls from {mean['sft', 'exact']} to {mean['dpo_offline', 'exact']}.",
        f"chosen answers: {mean['dpo_offline_nll', 'preferred']} of the answers are preferred.",
        f"writes it: {mean['dpo', 'preferred']} of the answers are preferred, and "
        f"{mean['dpo', 'exact']} are exact.",
    ):
        assert sentence in " ".join(README.split()), sentence
    ceiling = statistics.mean(run["offline pairs"]["ceiling"] for run in runs["dpo_offline"])
    log = f"(see the README), and {mean['dpo_offline', 'exact']} of the answers are right."
    for sentence in (f"which is {0.8 * ceiling:.2f} here, whatever the loss", log):
        assert sentence in " ".join(RESULTS.split()), sentence


def test_online_pairs_end_near_the_optimum_as_the_page_says():
    """In the mean of the seeds, from beta = 0.8 on; reference pairs lose the arithmetic below."""
    for entry in PUBLISHED["optimum"]["study"]:
        settings, runs = entry["settings"], entry["runs"]
        off = statistics.mean(run["preferred"] - run["predicted"]["preferred"] for run in runs)
        if settings["pairs"] == "online":
            assert abs(off) <= 0.03 if settings["beta"] >= 0.8 else off > 0.03
        elif settings["loss"] != "imitation":
            exact = statistics.mean(run["exact"] for run in runs)
            assert off < -0.02 and (exact < 0.95) == (settings["beta"] < 0.8)


def test_the_readme_shows_the_loss_as_it_is():
    """All of dpo_loss but its docstring."""
    source = inspect.getsource(train_dpo.dpo_loss)
    docstring = ast.parse(source).body[0].body[0]
    lines = source.splitlines()
    shown = lines[: docstring.lineno - 1] + lines[docstring.end_lineno :]
    assert "```python\n" + "\n".join(shown) + "\n```" in README


def test_printed_equations_and_the_pair_are_those_of_the_command(capsys):
    for flags in ("--count 4", "--pairs --count 1"):
        data.main(data.parse_args(flags.split()))
        assert f"$ python data.py {flags}\n{capsys.readouterr().out}" in README


@pytest.mark.parametrize("model", [model for model in figures.MODELS if model != "sft"])
def test_make_and_the_readme_train_what_is_published(model):
    """Each with the settings and the learning rate that the lesson found best for it."""
    makefile, out = (ROOT / "Makefile").read_text(), f"runs/{model}.pt"
    settings = PUBLISHED["methods"][figures.label(model)]["settings"]
    flags = [f"--{name}={value}" for name, value in settings.items()]
    in_makefile = re.search(rf"^FLAGS_{model} := (.*)$", makefile, re.MULTILINE)
    in_readme = re.search(rf"python train_dpo.py (.*--out {out})", README)
    for found in (in_makefile, in_readme):
        shown = found[1].split() if found else []
        assert vars(train_dpo.parse_args([*shown, "--out", out])) == vars(
            train_dpo.parse_args([*flags, "--out", out])
        )


def test_every_published_method_is_one_of_the_lesson_over_all_its_seeds():
    for name, method in PUBLISHED["methods"].items():
        assert {k: v for k, v in method["settings"].items() if k != "lr"} in lesson.METHODS[name]
        assert [run["seed"] for run in method["runs"]] == list(lesson.SEEDS)


def test_every_figure_and_file_exists():
    for folder, page in ((ROOT, README), (ROOT / "plots", RESULTS)):
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", page):
            assert (folder / path).is_file(), path
    for path in re.findall(r"`([a-z_]+\.py)`", README):
        assert (ROOT / path).is_file(), path


def test_every_command_parses():
    commands = re.findall(r"python (\w+\.py)([^`\n#>|]*)", README)
    assert len(commands) > 8
    for script, flags in commands:
        SCRIPTS[script].parse_args(flags.split())
