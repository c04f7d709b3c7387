"""Part 4 of the study: when do offline pairs fail? One setting changed at a time.

    python -m plots.study.collapse            # writes collapse.json

Every run is train_dpo.py with `--pairs offline`, or with a file of such pairs, at the rate that
part 1 chose for them.
"""

import contextlib
import io

import torch

import data
import train_dpo
from data import measure, write_file
from model import load_checkpoint, logratios_of
from plots.study import runs
from plots.study.runs import FEWER, OFFLINE_LR

SAMPLES = 25  # answers to every sum
CASES = {  # flags of train_dpo.py; "pairs in a file" is done here
    "nothing": {},
    "β = 0.1": {"beta": 0.1},
    "β = 5": {"beta": 5},
    "a file of 100 pairs": {"pairs in a file": 100},
    "a file of 10,000 pairs": {"pairs in a file": 10_000},
    "five terms preferred": {"preferred-terms": 5},
}


def file_of_pairs(count, seed):
    """What `python data.py --pairs` prints, in a file."""
    path, printed = runs.RUNS / f"pairs_{count}_{seed}.jsonl", io.StringIO()
    with contextlib.redirect_stdout(printed):
        data.main(data.parse_args(["--pairs", f"--count={count}", f"--seed={seed}"]))
    write_file(path, printed.getvalue().encode())
    return path


def run(changed, seed):
    """The result of one run, with some settings changed: metrics and the KL."""
    settings = {"pairs": "offline", "lr": OFFLINE_LR} | changed
    name = runs.name_of((settings, seed))  # that of part 1, if it has the same run
    settings |= {"seed": seed, "sft": runs.RUNS / f"sft_{seed}.pt"}
    if count := settings.pop("pairs in a file", None):
        settings["pairs"] = file_of_pairs(count, seed)
    policy, saved_args, _ = load_checkpoint(runs.trained(train_dpo, name, settings))
    reference, _, _ = load_checkpoint(settings["sft"])
    answers = runs.sampled_answers(policy, SAMPLES, torch.Generator().manual_seed(seed))
    metrics = measure(answers, saved_args["preferred_terms"])
    kl = logratios_of(policy, reference, answers).mean().item()
    return {"seed": seed, "kl": kl} | {key: metrics[key] for key in ("preferred", "exact")}


def collapse(pool):
    """The content of collapse.json: {case: results}."""
    runs.train_sft_models(pool, FEWER)
    tasks = {case: [(changed, seed) for seed in FEWER] for case, changed in CASES.items()}
    return runs.gather(pool, "cases", run, tasks)


if __name__ == "__main__":
    runs.run_part("collapse", collapse, __doc__)
