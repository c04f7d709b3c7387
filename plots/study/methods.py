"""Part 1 of the study: every method of train_dpo.py, at its best learning rate, over seeds.

    python -m plots.study.methods

It writes methods.json. Every method has the same steps, batches and learning rates to choose from.
Those of the top README are also run at the default rate, offline pairs at every rate, and the
method with the KL on the policy's own answers with other weights of that KL, and with other beta.
"""

import random

import numpy as np
import torch

from data import MIN_SUM, entropy_floor, measure, random_equations, random_pairs, seen_sums
from model import answers_to, load_checkpoint, logps_of, logratios_of
from plots.study import frontier, runs
from plots.study.runs import DEFAULTS, FEWER, PAIR_SEED, PAIRS, SEEDS

OFFLINE, REFERENCE = {"pairs": "offline"}, {"pairs": "reference"}
# The flags of each method; all else is the default of train_dpo.py.
METHODS = {
    "offline": OFFLINE,
    "offline + KL": OFFLINE | {"kl-weight": 0.1},
    "offline + NLL": OFFLINE | {"nll-weight": 1},
    "mistakes": {"pairs": "mistakes"},
}
MORE_METHODS = {  # with fewer seeds
    "imitation": OFFLINE | {"loss": "imitation"},
    "online": {"pairs": "online"},
    "reference": REFERENCE,
    "reference + KL": REFERENCE | {"kl-weight": 0.03},  # a third of 128 prompts have a pair
    "offline, smoothed": OFFLINE | {"label-smoothing": 0.1},
}
# Changes of "offline + KL", for each of which the optimum can be computed.
CHANGES = [{"kl-weight": weight} for weight in (0.03, 0.1, 0.2, 0.3, 0.8)]
CHANGES += [{"beta": 2}, {"beta": 5}]
EQUATIONS, EQUATION_SEED = 20_000, 1_000_004  # on which the gap of SFT is measured


# ---- one run ---------------------------------------------------------------------------------


def run(settings, seed):
    """The result of one run of train_dpo.py, with the path of its policy."""
    policy, _, log = load_checkpoint(runs.trained_by_dpo(settings, seed))
    _, reference, p = runs.start(seed)
    looks = [runs.point_of(record) for record in log if "own" in record]
    return asked_of(policy, reference, p, seed) | {"looks": looks}


def run_sft(seed):
    """What is measured of an SFT model, with its gap to the floor, in nats per equation."""
    policy, reference, p = runs.start(seed)
    equations = random_equations(random.Random(EQUATION_SEED), EQUATIONS, seen_sums())
    equations = ["".join(example) for example in equations]
    gap = -logps_of(policy, equations).mean().item() - entropy_floor(equations)
    return asked_of(policy, reference, p, seed) | {"gap": gap, "p": p.tolist()}


def asked_of(policy, reference, p, seed):
    """What is measured of every model, its exact answers to the largest sum, and its rewards."""
    max_sum = policy.config.max_sum
    answers = answers_to(policy, [max_sum] * 1000, generator=torch.Generator().manual_seed(seed))
    pairs = random_pairs(random.Random(PAIR_SEED), PAIRS, seen_sums(max_sum), 3)
    sides = {"offline pairs": sides_of(policy, reference, p, pairs)}
    largest = {"largest": measure(answers, 3)["exact"]}
    return runs.measured(policy, reference, p, seed) | largest | sides


def sides_of(policy, reference, p, pairs):
    """Mean log pi - log pi_ref of both sides of pairs, and the ceiling of the chosen, in nats."""
    sides = [x + chosen for x, chosen, _ in pairs], [x + rejected for x, _, rejected in pairs]
    chosen, rejected = (logratios_of(policy, reference, side).mean().item() for side in sides)
    sums = torch.tensor([int(prompt[:-1]) for prompt, _, _ in pairs])
    ceiling = -p[sums - MIN_SUM].log().mean().item()
    return {"chosen": chosen, "rejected": rejected, "ceiling": ceiling}


# ---- the part --------------------------------------------------------------------------------


def methods(pool):
    """The content of methods.json."""
    ps = runs.train_sft_models(pool, (0, *SEEDS))[1:]
    content = runs.gather(pool, "SFT", run_sft, {"sft": [(seed,) for seed in SEEDS]})
    content["methods"] = runs.at_best_rate(pool, run, METHODS, SEEDS)
    content["methods"] |= runs.at_best_rate(pool, run, MORE_METHODS, FEWER)
    default = {"lr": DEFAULTS.lr}
    tasks = {name: [(row | default, seed) for seed in SEEDS] for name, row in METHODS.items()}
    content["default rate"] = runs.gather(pool, "default rate", run, tasks)
    every_rate = [{"lr": lr} for lr in runs.RATES]
    content["offline at every rate"] = with_changes(pool, OFFLINE, every_rate, SEEDS)
    best = content["methods"]["offline + KL"]["settings"]
    content["changes"] = with_changes(pool, best, CHANGES, FEWER)
    return content | {"frontier": curve(ps)}


def with_changes(pool, row, changes, seeds):
    """The results of a row with each of some changes of its settings."""
    tasks = {i: [(row | change, seed) for seed in seeds] for i, change in enumerate(changes)}
    results = runs.gather(pool, "changes", run, tasks)
    return [{"settings": change, "results": results[i]} for i, change in enumerate(changes)]


def curve(ps):
    """The frontier and the best of n, averaged over seeds, for the figure."""
    ps = torch.tensor(ps, dtype=torch.float64)
    log_ts = np.linspace(0, 12, 100)
    curves = [[frontier.optimal_policy(p, log_t) for log_t in log_ts] for p in ps]
    points = {n: [frontier.best_of_n(p, n) for p in ps] for n in (2, 4, 8, 16)}
    best = [[n, *np.mean(of_seeds, axis=0).tolist()] for n, of_seeds in points.items()]
    return {"curve": np.mean(curves, axis=0).tolist(), "best of n": best}


if __name__ == "__main__":
    runs.run_part("methods", methods)
