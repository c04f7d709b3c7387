"""Part 1 of the study: every method of train_dpo.py, at its best learning rate, over seeds.

    python -m plots.study.methods            # writes methods.json

Every method has the same steps, batches and learning rates to choose from, and so has every row of
the other parts. The settings are chosen on seed 0 and reported over other seeds. A rate is chosen
only when the next lower and the next higher one were tried as well. The method with the KL on the
policy's own answers is also run with other weights of that KL.
"""

import math
import random

import numpy as np
import torch

import train_dpo
from data import MIN_SUM, measure, random_pairs, seen_sums
from model import answer, load_checkpoint, logratios_of
from plots.study import frontier, runs
from plots.study.runs import FEWER, SEEDS

RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
FIRST_RATES = (1e-5, 3e-4, 1e-3)
OFFLINE, REFERENCE = {"pairs": "offline"}, {"pairs": "reference"}
# Of each method the settings to choose from; all else is the default of train_dpo.py.
METHODS = {
    "offline": [OFFLINE],
    "offline + KL": [OFFLINE | {"kl-weight": weight} for weight in (0.03, 0.1, 0.3)],
    "mistakes": [{"pairs": "mistakes"}],
}
MORE_METHODS = {  # with fewer seeds
    "offline + NLL": [OFFLINE | {"nll-weight": 1}],
    "imitation": [OFFLINE | {"loss": "imitation"}],
    "online": [{"pairs": "online"}],
    "reference": [REFERENCE],
    "reference + KL": [REFERENCE | {"kl-weight": weight} for weight in (0.03, 0.1)],
    "offline, smoothed": [OFFLINE | {"label-smoothing": 0.1}],
}
KL_WEIGHTS = (0.03, 0.1, 0.2, 0.3, 0.8)
EQUATIONS, EQUATION_SEED = 20_000, 1_000_004  # on which the gap of SFT is measured
PAIRS, PAIR_SEED = 2000, 1_000_003  # offline pairs whose two sides every model is asked about


# ---- one run ---------------------------------------------------------------------------------


def run(settings, seed):
    """The result of one run of train_dpo.py, with the path of its policy."""
    flags = settings | {"seed": seed, "sft": runs.RUNS / f"sft_{seed}.pt"}
    checkpoint = runs.trained(train_dpo, runs.name_of((settings, seed)), flags)
    policy, _, log = load_checkpoint(checkpoint)
    _, reference, p = runs.start(seed)
    looks = [runs.point_of(record) for record in log if "own" in record]
    return asked_of(policy, reference, p, seed) | {"looks": looks}


def run_sft(seed):
    """What is measured of an SFT model, with its gap to the floor, in nats per equation."""
    policy, reference, p = runs.start(seed)
    gap = runs.gap_of(policy, EQUATIONS, EQUATION_SEED)
    return asked_of(policy, reference, p, seed) | {"gap": gap, "p": p.tolist()}


def asked_of(policy, reference, p, seed):
    """All that the page says of one model."""
    result = runs.measured(policy, reference, p, seed)
    max_sum = policy.config.max_sum
    answers = answer(policy, [max_sum] * 1000, generator=torch.Generator().manual_seed(seed))
    pairs = random_pairs(random.Random(PAIR_SEED), PAIRS, seen_sums(max_sum), 3)
    sides = sides_of(policy, reference, p, pairs)
    return result | {"largest": measure(answers, 3)["exact"], "offline pairs": sides}


def sides_of(policy, reference, p, pairs):
    """Mean log pi - log pi_ref of both sides of pairs, and the ceiling of the chosen, in nats."""
    sides = [x + chosen for x, chosen, _ in pairs], [x + rejected for x, _, rejected in pairs]
    chosen, rejected = (logratios_of(policy, reference, side).mean().item() for side in sides)
    sums = torch.tensor([int(prompt[:-1]) for prompt, _, _ in pairs])
    ceiling = -p[sums - MIN_SUM].log().mean().item()
    return {"chosen": chosen, "rejected": rejected, "ceiling": ceiling}


# ---- the choice of settings ------------------------------------------------------------------


def most_preferred(tried):
    """The settings with the most preferred answers, of all (settings, result) that were tried.

    Others take their place that have as many within the noise, and more exact ones beyond it.
    """
    n = tried[0][1]["sampled"]["n"]
    preferred, exact = ([r["sampled"][key] for _, r in tried] for key in ("preferred", "exact"))

    def within_noise(share, other):
        variance = share * (1 - share) + other * (1 - other)
        return abs(share - other) <= 2 * math.sqrt(variance / n)  # two standard errors

    best = preferred.index(max(preferred))
    for i in range(len(tried)):
        more_exact = exact[i] > exact[best] and not within_noise(exact[best], exact[i])
        if within_noise(max(preferred), preferred[i]) and more_exact:
            best = i
    return tried[best][0]


def tried_settings(pool, run, variants, best_of):
    """{name: all (settings, result) that were tried on seed 0} for {name: settings to start from}.

    Starts at FIRST_RATES, and goes on until the rates next to the best one have been tried.
    """
    to_try = {
        name: [settings | {"lr": lr} for settings in of_name for lr in FIRST_RATES]
        for name, of_name in variants.items()
    }
    tried = {name: [] for name in variants}
    while any(to_try.values()):
        tasks = {name: [(settings, 0) for settings in to_try[name]] for name in variants}
        results = runs.gather(pool, "rates", run, tasks)
        for name in variants:
            tried[name] += zip(to_try[name], results[name])
            best, done = best_of(tried[name]), [settings for settings, _ in tried[name]]
            i = RATES.index(best["lr"])
            beside = [best | {"lr": lr} for lr in RATES[max(0, i - 1) : i + 2]]
            to_try[name] = [settings for settings in beside if settings not in done]
    return tried


def at_best_settings(pool, run, variants, seeds, best_of=most_preferred):
    """{name: its best settings, what was tried on seed 0, and its runs over seeds}.

    What was tried: a list of [settings, share of preferred answers, share of exact ones].
    """
    tried = tried_settings(pool, run, variants, best_of)
    best = {name: best_of(tried[name]) for name in variants}
    tasks = {name: [(best[name], seed) for seed in seeds] for name in variants}
    results = runs.gather(pool, "runs", run, tasks)
    shares = {
        name: [[s, r["sampled"]["preferred"], r["sampled"]["exact"]] for s, r in tried[name]]
        for name in variants
    }
    return {
        name: {"settings": best[name], "tried": shares[name], "runs": results[name]}
        for name in variants
    }


# ---- the part --------------------------------------------------------------------------------


def methods(pool):
    """The content of methods.json."""
    ps = runs.train_sft_models(pool, (0, *SEEDS))[1:]
    content = runs.gather(pool, "SFT", run_sft, {"sft": [(seed,) for seed in SEEDS]})
    content["methods"] = at_best_settings(pool, run, METHODS, SEEDS)
    content["methods"] |= at_best_settings(pool, run, MORE_METHODS, FEWER)
    best = content["methods"]["offline + KL"]["settings"]
    tasks = {
        weight: [(best | {"kl-weight": weight}, seed) for seed in FEWER] for weight in KL_WEIGHTS
    }
    content["kl weights"] = runs.gather(pool, "weights of the KL", run, tasks)
    return content | {"frontier": curve(ps)}


def curve(ps):
    """The frontier and the best of n, averaged over seeds, for the figure."""
    ps = torch.tensor(ps, dtype=torch.float64)
    log_ts = np.linspace(0, 12, 100)
    curves = [[frontier.optimal_policy(p, log_t) for log_t in log_ts] for p in ps]
    points = {n: [frontier.best_of_n(p, n) for p in ps] for n in (2, 4, 8, 16)}
    best = [[n, *np.mean(of_seeds, axis=0).tolist()] for n, of_seeds in points.items()]
    return {"curve": np.mean(curves, axis=0).tolist(), "best of n": best}


if __name__ == "__main__":
    runs.run_part("methods", methods, __doc__)
