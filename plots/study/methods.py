"""Part 1 of the study: every method of train_dpo.py, at its best learning rate, over seeds.

    python -m plots.study.methods            # writes methods.json

Every method has the same steps, batches and learning rates to choose from. The rate is chosen on
seed 0 and reported over other seeds. It is the one with the most preferred answers, unless another
has as many within the noise and more exact ones beyond it. A method that is best at the edge of the
rates gets more.
"""

import math
import random

import numpy as np
import torch

import train_dpo
from data import END, MIN_SUM, PROMPT_WIDTH, collate, measure
from data import random_pairs, seen_sums
from model import answer, load_checkpoint, logratios_of
from plots.study import frontier, runs

SEEDS = (1, 2, 3, 4, 5)
FEWER = SEEDS[:3]  # for the other methods, to save time
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
BEYOND = {1e-4: 3e-5, 3e-5: 1e-5, 1e-5: 3e-6, 3e-3: 1e-2}  # the rate to try next, at an edge
IPO = {"pairs": "offline", "loss": "ipo"}
METHODS = {  # name: settings, each tried at every rate; all else is the default of train_dpo.py
    "offline": [{"pairs": "offline"}],
    "offline + NLL": [{"pairs": "offline", "nll-weight": 1}],
    "mistakes": [{"pairs": "mistakes"}],
    "mistakes + NLL": [{"pairs": "mistakes", "nll-weight": 1}],
    "imitation": [{"pairs": "offline", "loss": "imitation"}],
    "online": [{"pairs": "online"}],
    "reference": [{"pairs": "reference"}],
    "reference + NLL": [{"pairs": "reference", "nll-weight": 1}],
    "offline, IPO": [IPO | {"beta": 0.1}, IPO | {"beta": 0.8}],
    "offline, smoothed": [{"pairs": "offline", "label-smoothing": 0.1}],
}
ALL_SEEDS = ("offline", "offline + NLL", "mistakes", "mistakes + NLL", "imitation")
OUTSIDE = [2, 3, 4, *range(101, 111)]  # sums that training never has
EQUATIONS, EQUATION_SEED = 20_000, 1_000_004  # on which the gap of SFT is measured
PAIRS, PAIR_SEED = 2000, 1_000_003  # offline pairs whose two sides every model is asked about


def run(settings, seed):
    """The result of one run of train_dpo.py."""
    name = runs.name_of(settings, seed)
    return runs.kept(name, lambda: train_and_measure(name, settings, seed))


def train_and_measure(name, settings, seed):
    flags = settings | {"seed": seed, "sft": runs.RUNS / f"sft_{seed}.pt"}
    policy, _, log = load_checkpoint(runs.trained(train_dpo, name, flags))
    samples = runs.SAMPLES if seed in SEEDS else runs.SAMPLES // 5
    _, reference, p = runs.start(seed)
    looks = [
        {"step": record["step"]} | {key: record["own"][key] for key in ("kl", "preferred", "exact")}
        for record in log
        if "own" in record
    ]
    return asked_of(policy, reference, p, seed, samples) | {"looks": looks}


def sft_result(seed):
    """What is measured of an SFT model, with its gap to the floor, in nats per equation."""

    def compute():
        policy, reference, p = runs.start(seed)
        gap = runs.gap_of(policy, EQUATIONS, EQUATION_SEED)
        return asked_of(policy, reference, p, seed, runs.SAMPLES) | {"gap": gap, "p": p.tolist()}

    return runs.kept(f"sft_result_{seed}", compute)


def asked_of(policy, reference, p, seed, samples):
    """All that the page says of one model."""
    generator = torch.Generator().manual_seed(seed)
    result = runs.measured(policy, reference, p, seed, samples)
    max_sum = policy.config.max_sum
    for name, sums in (("largest", [max_sum] * 10), ("outside", OUTSIDE)):
        answers = answer(policy, sums * samples, generator=generator)
        result[name] = measure(answers, 3)["exact"]
    pairs = random_pairs(random.Random(PAIR_SEED), PAIRS, seen_sums(max_sum), 3)
    result["offline pairs"] = sides_of(policy, reference, p, pairs)
    result["next token"] = next_token(policy, pairs)
    return result


def sides_of(policy, reference, p, pairs):
    """Mean log pi - log pi_ref of both sides of pairs, and the ceiling of the chosen, in nats."""
    sides = [x + chosen for x, chosen, _ in pairs], [x + rejected for x, _, rejected in pairs]
    chosen, rejected = (logratios_of(policy, reference, side).mean().item() for side in sides)
    sums = torch.tensor([int(prompt[:-1]) for prompt, _, _ in pairs])
    ceiling = -p[sums - MIN_SUM].log().mean().item()
    return {"chosen": chosen, "rejected": rejected, "ceiling": ceiling}


@torch.no_grad()
def next_token(policy, pairs):
    """Mean probabilities of two tokens of rejected, right completions, by their term count.

    The end token after the last digit, where the sum is complete, and that last digit.
    """
    tokens, mask = collate([(prompt, rejected) for prompt, _, rejected in pairs])
    probabilities = policy(tokens).softmax(-1)  # (B, T, V)
    rows, ends = torch.arange(len(pairs)), PROMPT_WIDTH + mask.sum(1) - 1  # (B,)
    end = probabilities[rows, ends - 1, END]  # (B,)
    right_digit = probabilities[rows, ends - 2, tokens[rows, ends - 1]]  # (B,)
    counts = torch.tensor([rejected.count("+") + 1 for _, _, rejected in pairs])
    return {
        str(k): {
            "end": end[counts == k].mean().item(),
            "right digit": right_digit[counts == k].mean().item(),
        }
        for k in sorted(set(counts.tolist()))
    }


# ---- the part --------------------------------------------------------------------------------


def best_of(tried):
    """The settings with the most preferred answers, of all (settings, result) that were tried.

    Others take their place that have as many within the noise, and more exact ones beyond it.
    """
    n = tried[0][1]["sampled"]["n"]
    preferred, exact = ([r["sampled"][key] for _, r in tried] for key in ("preferred", "exact"))

    def within_noise(share, other):
        return abs(share - other) <= 2 * math.sqrt(2 * share * (1 - share) / n)  # standard errors

    best = preferred.index(max(preferred))
    for i in range(len(tried)):
        more_exact = exact[i] > exact[best] and not within_noise(exact[best], exact[i])
        if within_noise(max(preferred), preferred[i]) and more_exact:
            best = i
    return tried[best][0]


def shares_of(tried):
    """[settings, share of preferred answers, share of exact ones] of all that was tried."""
    return [[s, r["sampled"]["preferred"], r["sampled"]["exact"]] for s, r in tried]


def choose(pool):
    """{method: its tried settings with their results on seed 0}, with more rates at an edge."""
    grids = {
        name: [settings | {"lr": rate} for settings in variants for rate in RATES]
        for name, variants in METHODS.items()
    }
    tried = {name: [] for name in METHODS}
    while any(grids.values()):
        futures = {
            (name, i): pool.submit(run, settings, 0)
            for name, grid in grids.items()
            for i, settings in enumerate(grid)
        }
        for (name, i), result in runs.gather("rates", futures).items():
            tried[name].append((grids[name][i], result))
        for name in METHODS:
            best = best_of(tried[name])
            beyond = best | {"lr": BEYOND.get(best["lr"], best["lr"])}
            done = [settings for settings, _ in tried[name]]
            grids[name] = [] if beyond in done else [beyond]
    return tried


def methods(pool):
    """The content of methods.json."""
    runs.train_sft_models(pool, (0, *SEEDS))
    sft = runs.gather("SFT", {seed: pool.submit(sft_result, seed) for seed in SEEDS})
    tried = choose(pool)
    content, futures = {}, {}
    for name, of_method in tried.items():
        best = best_of(of_method)
        content[name] = {"settings": best, "tried": shares_of(of_method)}
        for seed in SEEDS if name in ALL_SEEDS else FEWER:
            futures[name, seed] = pool.submit(run, best, seed)
    results = runs.gather("methods", futures)
    for name, method in content.items():
        method["runs"] = [result for key, result in results.items() if key[0] == name]
    return {"sft": list(sft.values()), "methods": content, "frontier": curve(sft.values())}


def curve(sft):
    """The frontier and the best of n, averaged over seeds, for the figure."""
    ps = [torch.tensor(result["p"], dtype=torch.float64) for result in sft]
    log_ts = np.linspace(0, 12, 100)
    curves = [[frontier.optimal_policy(p, log_t) for log_t in log_ts] for p in ps]
    points = {n: [frontier.best_of(p, n) for p in ps] for n in (2, 4, 8, 16)}
    best = [[n, *np.mean(of_seeds, axis=0).tolist()] for n, of_seeds in points.items()]
    return {"curve": np.mean(curves, axis=0).tolist(), "best of n": best}


if __name__ == "__main__":
    runs.run_part("methods", methods)
