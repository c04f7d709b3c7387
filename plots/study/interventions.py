"""Part 3 of the study: which tokens of the rejected sides do the harm?

    python -m plots.study.interventions

It writes interventions.json. Every variant is `offline` of train_dpo.py, with one change. Either
some tokens of the rejected side are left out of its log-prob, in policy and reference alike; or
every other rejected side is a wrong sum. Part 1 has the runs in which nothing is changed.
"""

import random

import torch
import torch.nn.functional as F

from data import collate, encode, random_pairs, seen_sums
from model import completion_logps
from plots.study import runs
from plots.study.runs import BATCH, BETA, PAIR_SEED, PAIRS, SEEDS, STEPS, wrong_sum
from train_dpo import dpo_loss

# ---- tokens that count -----------------------------------------------------------------------
# Each maps the tokens and the mask of rejected sides, (B, T) each, and the reference to the mask
# of those that count.


def all_tokens(tokens, mask, reference):
    return mask


def end_token(tokens, mask, reference):
    return mask & (still_to_come(mask) == 1)


def first_terms(tokens, mask, reference):
    """All up to the last plus sign."""
    plus = (tokens == encode("+")[0]) & mask
    return mask & (still_to_come(plus) > 0)


def last_term(tokens, mask, reference):
    """The digits after the last plus sign."""
    return mask & ~first_terms(tokens, mask, reference) & ~end_token(tokens, mask, reference)


def all_but_last_term(tokens, mask, reference):
    return mask & ~last_term(tokens, mask, reference)


def unlikely_tokens(tokens, mask, reference):
    """Those that the reference gives less than one half."""
    p = reference(tokens[:, :-1]).softmax(-1)  # (B, T - 1, V)
    p = p.gather(2, tokens[:, 1:, None])[:, :, 0]  # (B, T - 1), of the tokens that came
    return mask & F.pad(p < 0.5, (1, 0))  # (B, T)


def still_to_come(mask):
    """How many columns from here on are True, this one included: (B, T) -> (B, T)."""
    return mask.flip(1).cumsum(1).flip(1)


# ---- other rejected sides --------------------------------------------------------------------
# Each maps a random state and a pair (prompt, chosen, rejected) to the rejected side that is used.


def as_it_is(rng, pair):
    return pair[2]


def half_wrong_sums(rng, pair):
    """Every other rejected side has a wrong sum: one side of the pair with one term changed."""
    return wrong_sum(rng, rng.choice(pair[1:])) if rng.random() < 0.5 else pair[2]


VARIANTS = {  # name: (tokens that count, rejected side)
    "offline": (all_tokens, as_it_is),
    "all but the last term": (all_but_last_term, as_it_is),
    "the terms before the last": (first_terms, as_it_is),
    "the last term": (last_term, as_it_is),
    "the end token": (end_token, as_it_is),
    "tokens below one half": (unlikely_tokens, as_it_is),
    "half wrong sums": (all_tokens, half_wrong_sums),
}


# ---- one run ---------------------------------------------------------------------------------


def four_logps(policy, reference, pairs, tokens_that_count):
    """The log-probs that dpo_loss takes; those of the rejected side count some tokens only."""
    chosen = collate([(x, chosen) for x, chosen, _ in pairs])
    tokens, mask = collate([(x, rejected) for x, _, rejected in pairs])
    with torch.no_grad():
        sides = chosen, (tokens, tokens_that_count(tokens, mask, reference))
        ref_logps = [completion_logps(reference, *side) for side in sides]
    return *(completion_logps(policy, *side) for side in sides), *ref_logps


def pairs_of(variant, rng, rng_of_sides, count, sums):
    """Pairs of the generator with the rejected sides of a variant."""
    _, rejected_side = VARIANTS[variant]
    pairs = random_pairs(rng, count, sums, 3)
    return [(*pair[:2], rejected_side(rng_of_sides, pair)) for pair in pairs]


def train(policy, reference, variant, lr, seed):
    """Trains the policy; returns the mean z of pairs of the variant at the end, in nats."""
    tokens_that_count, _ = VARIANTS[variant]
    rng, rng_of_sides = random.Random(seed), random.Random(seed)
    sums = seen_sums(policy.config.max_sum)
    optimizer = runs.adamw(policy, lr)
    for step in range(1, STEPS + 1):
        pairs = pairs_of(variant, rng, rng_of_sides, BATCH, sums)
        logps = four_logps(policy, reference, pairs, tokens_that_count)
        runs.update(optimizer, dpo_loss(*logps, BETA)[0].mean(), step, STEPS)
    pairs = pairs_of(variant, random.Random(PAIR_SEED), rng_of_sides, PAIRS, sums)
    with torch.no_grad():
        logps = four_logps(policy, reference, pairs, tokens_that_count)
    _, chosen_rewards, rejected_rewards = dpo_loss(*logps, BETA)
    return ((chosen_rewards - rejected_rewards) / BETA).mean().item()


def run(settings, seed):
    """The result of one run, with the mean z of its pairs."""
    policy, reference, p = runs.start(seed)
    z = train(policy, reference, settings["variant"], settings["lr"], seed)
    return runs.measured(policy, reference, p, seed) | {"z of pairs": z}


def interventions(pool):
    """The content of interventions.json: every variant but "offline"."""
    runs.train_sft_models(pool, (0, *SEEDS))
    rows = {name: {"variant": name} for name in VARIANTS if name != "offline"}
    return runs.at_best_rate(pool, run, rows, SEEDS)


if __name__ == "__main__":
    runs.run_part("interventions", interventions)
