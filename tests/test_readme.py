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
from plots.study import runs, tables
from plots.study.figures import rate_text

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text(encoding="utf-8") for page in tables.PAGES}
README, RESULTS = (" ".join(page.split()) for page in PAGES.values())
STUDY = tables.read_study()
OF_DEFAULT = {f"default {name}": x for name, x in STUDY["methods"]["default rate"].items()}
OF_RATES = STUDY["methods"]["offline at every rate"]
OF_RATES = {f"offline at {rate_text(x['settings']['lr'])}": x["results"] for x in OF_RATES}
RUNS = tables.results_of(STUDY) | OF_DEFAULT | OF_RATES
SENTENCES = [  # (page, sentence): {runs: metric} stands for what `filled` writes there
    (README, "{SFT: least} is the least at which all can be preferred"),
    (README, "the end DPO wins {default offline: pairs won} of the"),
    (README, "of the pairs, and {default offline: exact} of the"),
    (README, "exact answers to them ({SFT: held out} after SFT)"),
    (README, "but exact rises from {default offline: exact} to 1,"),
    (README, "1, and preferred from {default offline: preferred} to {default offline: kept}."),
    (README, "counts in the loss, {the last term: exact} are exact;"),
    (README, "the last term counts, {all but the last term: exact}."),
    (README, "Of *offline*'s answers, {default offline: wrong of other counts} are wrong"),
    (README, "numbers of terms, and {default offline: wrong of three} wrong sums"),
    (README, "| `--kl-weight 0.1` | {offline + KL: preferred} | {offline + KL: exact} |"),
    (README, "| `--nll-weight 1` | {offline + NLL: preferred} | {offline + NLL: exact} |"),
    (README, "| `--pairs mistakes` | {mistakes: preferred} | {mistakes: exact} |"),
    (README, "| Exercise 4 | {half wrong sums: preferred} | {half wrong sums: exact} |"),
    (README, "| {RLHF: preferred} | {RLHF: exact}"),
    (RESULTS, "more answers stay exact ({offline at 3e-6: exact}), and the"),
    (RESULTS, "is hardly learned ({offline at 3e-6: preferred}, after SFT {SFT: preferred})."),
    (RESULTS, "3e-4, where {offline at 3e-4: exact} are exact."),
    (RESULTS, "with their ceiling, about {offline: ceiling} here."),
    (RESULTS, "NLL` come near it ({offline + NLL: chosen});"),
    (RESULTS, "of `offline` end at {offline: chosen}."),
    (RESULTS, "rejected side, end at {imitation: rejected} (`offline`: {offline: rejected})."),
    (RESULTS, "of the pairs is {offline, smoothed: z}, and {offline, smoothed: exact} of the"),
    (RESULTS, "NLL` falls to {offline + NLL: lowest} exact, and ends at {offline + NLL: exact}."),
    (RESULTS, "generator nearly do (gap {SFT: gap})."),
    (RESULTS, "most preferred answers ({online: preferred}), but it ends {online: excess} nats"),
    (RESULTS, "nats above the frontier, {online: drift} of them"),
    (RESULTS, "held-out sums, {SFT: held out} are exact after SFT and {mistakes: held out}"),
    (RESULTS, "100, the hardest sum, {SFT: largest} and {mistakes: largest} are."),
    (RESULTS, "gap of SFT is {SFT: gap} nats."),
    (RESULTS, "(exact without it: {offline, by seed: exact}; with it:"),
    (RESULTS, "; with it: {offline + KL, by seed: exact})."),
    (RESULTS, "four of five seeds ({RLHF without the KL, by seed: exact} are exact)."),
    (RESULTS, "last term alone counts, {the last term: exact} of the"),
    (RESULTS, "all but it counts, {all but the last term: exact} are."),
    (RESULTS, "alone, it leaves {the end token: exact}."),
    (RESULTS, "preference without a KL** ({the terms before the last: preferred} preferred,"),
    (RESULTS, "preferred, {the terms before the last: exact} exact)."),
    (RESULTS, "one half ({tokens below one half: preferred}, {tokens below one half: exact};"),
    (RESULTS, "what becomes likely ({half wrong sums: preferred}, {half wrong sums: exact})."),
    (RESULTS, "KL is larger ({half wrong sums: kl}; `offline + KL`: {offline + KL: kl})"),
    (RESULTS, "at most {five terms preferred: preferred} are preferred"),
    (RESULTS, "no preference ({a file of 100 pairs: preferred}, after SFT {SFT: preferred})."),
]


def metrics_of(run):
    """What the pages say of a run, by name."""
    sampled = run["sampled"]
    counts, exact = (sampled[key] for key in ("counts", "exact_counts"))
    metrics = run | sampled | {"kept": sampled["preferred"] / sampled["exact"]}
    metrics["wrong of three"] = counts.get("3", 0) - exact.get("3", 0)
    wrong_sums = sampled["parse_rate"] - sampled["exact"]
    metrics["wrong of other counts"] = wrong_sums - metrics["wrong of three"]
    if "p" in run:
        metrics["least"] = -fmean(map(math.log, run["p"]))
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


def test_no_row_has_an_untried_rate_and_the_most_preferred_one_was_taken():
    for name, row in tables.rows_of(STUDY).items():
        rates, preferred, _ = zip(*row["tried"])
        assert rates == runs.RATES, name
        assert row["settings"]["lr"] == rates[preferred.index(max(preferred))], name
        assert [result["seed"] for result in row["results"]] in ([1, 2, 3], [1, 2, 3, 4, 5])
    for results in (*OF_RATES.values(), *OF_DEFAULT.values()):
        assert [result["seed"] for result in results] == [1, 2, 3, 4, 5]


def filled(sentence):
    """With the numbers of the runs: a mean over the seeds, or one for each of them."""

    def number(found):
        name, metric = found[1].split(": ")
        values = [metrics_of(run)[metric] for run in RUNS[name.removesuffix(", by seed")]]
        if name.endswith(", by seed"):
            *first, last = (f"{value:.3f}" for value in values)
            return f"{', '.join(first)} and {last}"
        return f"{fmean(values):.3f}".replace("-", "−")

    return re.sub(r"\{(.*?)\}", number, sentence)


@pytest.mark.parametrize("page, sentence", SENTENCES, ids=range(len(SENTENCES)))
def test_numbers_in_sentences_are_rounded_means_over_the_seeds(page, sentence):
    assert filled(sentence) in page


def test_numbers_of_single_runs_are_those_of_the_study():
    """What reward models have learned, and what rates do to offline pairs and half wrong sums."""
    for kind, others in (("3 terms, wrong", "wrong ones"), ("other count, exact", "other counts")):
        gaps = [rewards["3 terms, exact"] - rewards[kind] for rewards in STUDY["rlhf"]["rewards"]]
        assert f"{min(gaps):.1f} to {max(gaps):.1f} more than {others}" in RESULTS
    tried = STUDY["interventions"]["half wrong sums"]["tried"]
    most = max(fmean(map(tables.PREFERRED, results)) for results in OF_RATES.values())
    assert all(f"leaves more than {most:.3f} preferred" in page for page in (README, RESULTS))
    (rate,) = [rate_text(lr) for lr, preferred, _ in tried if preferred > 0.9]
    assert f"{rate} alone has more than 0.9 preferred on seed 0" in RESULTS


def test_the_readme_shows_the_loss_as_it_is():
    """The body of dpo_loss, but for its two branches, which are off by default."""
    body = inspect.getsource(train_dpo.dpo_loss).split('"""')[2].strip("\n")
    shown = re.sub(r"    if .*\n        .*\n", "", body)
    assert f"{shown}\n```" in PAGES[tables.PAGES[0]] and "logsigmoid(beta * z)\n    return" in shown


def test_the_worked_pair_of_the_readme_adds_up():
    """z, the loss and the share of its full pull, at beta = 0.8."""
    z, loss, weight = re.search(
        r"z = ([0-9.]+), and the loss is ([0-9.]+)\..* \(σ\(−β z\) = ([0-9.]+)\)", README
    ).groups()
    exact = 1 / (1 + math.exp(0.8 * float(z)))
    assert (loss, weight) == (f"{-math.log(1 - exact):.3f}", f"{exact:.3f}")


def test_printed_equations_and_the_pair_are_those_of_the_command(capsys):
    for flags in ("--count 4", "--pairs --count 1"):
        data.main(data.parse_args(flags.split()))
        assert f"$ python data.py {flags}\n{capsys.readouterr().out}" in PAGES[tables.PAGES[0]]


def test_make_and_the_readme_train_the_methods_of_the_table_at_the_default_rate():
    in_makefile = re.findall(r"^FLAGS_\w+ :=(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    by_hand = re.findall(r"^python train_dpo\.py(.*)$", PAGES[tables.PAGES[0]], re.MULTILINE)
    for commands in (in_makefile, by_hand[:3]):
        args = [vars(train_dpo.parse_args(flags.split())) for flags in commands]
        assert [evaluate.label_of(x) for x in args] == ["offline", "offline + KL", "mistakes"]
        for x in args:
            flags = STUDY["methods"]["methods"][evaluate.label_of(x)]["settings"].items()
            flags = [f"--{flag}={value}" for flag, value in flags if flag != "lr"]
            assert x | {"out": None} == vars(train_dpo.parse_args(flags)) | {"out": None}


def test_every_figure_file_and_command_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mended.jsonl").touch()  # the reader writes it
    for page, text in PAGES.items():
        for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text):
            assert (page.parent / path).is_file(), path
        commands = re.findall(r"python (\w+)\.py([^`\n#>|]*)", text)
        for script, flags in commands:
            importlib.import_module(script).parse_args(flags.split())
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module), module
        assert len(commands) > 8 or page != tables.PAGES[0]
    for path in re.findall(r"`([a-z_/]+\.(?:py|json))`", README + RESULTS):
        assert any((folder / path).is_file() for folder in (ROOT, ROOT / "plots/study")), path
