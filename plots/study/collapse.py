"""Part 4 of the study: when do the classic pairs fail? One setting changed at a time.

    python -m plots.study.collapse            # writes collapse.json

Every run is train_dpo.py with `--pairs offline`, or with a file of such pairs, at the rate that
part 1 chose for them.
"""

import contextlib
import io
import itertools

import torch

import data
import train_dpo
import train_sft
from data import measure, write_file
from model import load_checkpoint, logratios_of
from plots.study import runs

SEEDS = (1, 2, 3)
LR = 3e-4
SAMPLES = 25  # answers to every sum
SFT_STEPS = {24: 3000, 96: 1500}  # by width: fewer where a step takes longer
CASES = {  # flags of train_dpo.py; "pairs in a file" and "width" (of SFT) are done here
    "nothing": {},
    "β = 0.1": {"beta": 0.1},
    "β = 5": {"beta": 5},
    "a file of 100 pairs": {"pairs in a file": 100},
    "a file of 1,000 pairs": {"pairs in a file": 1000},
    "a file of 10,000 pairs": {"pairs in a file": 10_000},
    "two terms preferred": {"preferred-terms": 2},
    "five terms preferred": {"preferred-terms": 5},
    "width 24": {"width": 24},
    "width 96": {"width": 96},
}


def file_of_pairs(count, seed):
    """What `python data.py --pairs` prints, in a file."""
    path, printed = runs.RUNS / f"pairs_{count}_{seed}.jsonl", io.StringIO()
    with contextlib.redirect_stdout(printed):
        data.main(data.parse_args(["--pairs", f"--count={count}", f"--seed={seed}"]))
    write_file(path, printed.getvalue().encode())
    return path


def run(case, seed):
    """The result of one run: metrics, the KL, and the gap of its SFT model."""

    def compute():
        settings = {"pairs": "offline", "lr": LR} | CASES[case]
        name = runs.name_of(settings, seed)  # that of part 1, if it has the same run
        settings |= {"seed": seed, "sft": runs.RUNS / f"sft_{seed}.pt"}
        if width := settings.pop("width", None):
            flags = {"seed": seed, "width": width, "steps": SFT_STEPS[width]}
            settings["sft"] = runs.trained(train_sft, f"sft_{width}_{seed}", flags)
        if count := settings.pop("pairs in a file", None):
            settings["pairs"] = file_of_pairs(count, seed)
        policy, saved_args, _ = load_checkpoint(runs.trained(train_dpo, name, settings))
        reference, _, _ = load_checkpoint(settings["sft"])
        generator = torch.Generator().manual_seed(seed)
        answers = runs.sampled_answers(policy, SAMPLES, generator)
        metrics = measure(answers, saved_args["preferred_terms"])
        return {key: metrics[key] for key in ("preferred", "exact", "counts")} | {
            "seed": seed,
            "kl": logratios_of(policy, reference, answers).mean().item(),
            "gap": runs.gap_of(reference, 5000, seed),
        }

    return runs.kept(f"collapse/{case.replace(' ', '_')}_{seed}", compute)


def collapse(pool):
    """The content of collapse.json: {case: results}."""
    runs.train_sft_models(pool, SEEDS)
    widths_first = itertools.product(reversed(CASES), SEEDS)  # they take longest
    results = runs.gather("cases", {task: pool.submit(run, *task) for task in widths_first})
    return {case: [results[case, seed] for seed in SEEDS] for case in CASES}


if __name__ == "__main__":
    runs.run_part("collapse", collapse)
