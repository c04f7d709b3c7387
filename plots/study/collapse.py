"""Part 4 of the study: when do offline pairs fail? One setting changed at a time.

    python -m plots.study.collapse            # writes collapse.json

Every run is train_dpo.py with `--pairs offline`, or with a file of such pairs. Each case has the
rate that is best for it.
"""

import contextlib
import io

import data
import train_dpo
from data import write_file
from evaluate import result_of
from model import load_checkpoint
from plots.study import runs
from plots.study.methods import OFFLINE, at_best_settings
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
    name = runs.name_of((settings, seed))
    flags = settings | {"seed": seed, "sft": runs.RUNS / f"sft_{seed}.pt"}
    if count := flags.pop("pairs in a file", None):
        flags["pairs"] = file_of_pairs(count, seed)
    policy, saved_args, _ = load_checkpoint(runs.trained(train_dpo, name, flags))
    reference, _, _ = load_checkpoint(flags["sft"])
    answers_and_logratios = runs.own_answers(policy, reference, seed)
    terms = saved_args["preferred_terms"]
    return result_of(policy, *answers_and_logratios, terms, seed) | {"seed": seed}


def collapse(pool):
    """The content of collapse.json: every case; part 1 has the runs in which nothing is changed."""
    runs.train_sft_models(pool, (0, *FEWER))
    variants = {case: [OFFLINE | changed] for case, changed in CASES.items()}
    return at_best_settings(pool, run, variants, FEWER)


if __name__ == "__main__":
    runs.run_part("collapse", collapse, __doc__)
