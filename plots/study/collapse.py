"""Part 4 of the study: when do offline pairs fail? One setting changed at a time.

    python -m plots.study.collapse

It writes collapse.json. Every run is train_dpo.py with `--pairs offline`, or with a file of such
pairs. Each case has the rate that is best for it. Part 1 has the runs in which nothing is changed.
"""

import contextlib
import io

import data
import train_dpo
from data import measure, write_file
from model import load_checkpoint
from plots.study import runs
from plots.study.runs import FEWER

CASES = {  # flags of train_dpo.py; "pairs in a file" is done here
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


def run(settings, seed):
    """The result of one run."""
    sft = runs.trained_by_sft(seed)
    flags = {"pairs": "offline"} | settings | {"seed": seed, "sft": sft}
    if count := flags.pop("pairs in a file", None):
        flags["pairs"] = file_of_pairs(count, seed)
    checkpoint = runs.trained(train_dpo, runs.name_of((settings, seed)), flags)
    policy, saved_args, _ = load_checkpoint(checkpoint)
    reference, _, _ = load_checkpoint(sft)
    answers, logratios = runs.own_answers(policy, reference, seed)
    sampled = measure(answers, saved_args["preferred_terms"])
    return {"seed": seed, "sampled": sampled, "kl": logratios.mean().item()}


def collapse(pool):
    """The content of collapse.json."""
    runs.train_sft_models(pool, (0, *FEWER))
    return runs.at_best_rate(pool, run, CASES, FEWER)


if __name__ == "__main__":
    runs.run_part("collapse", collapse)
