"""Part 3 of the study: which tokens of the rejected sides do the harm?

    python -m plots.study.interventions            # writes interventions.json

Every variant is `offline` of train_dpo.py, with one change. Either some tokens of the rejected side
are left out of its log-prob, in policy and reference alike; or every other rejected side is a wrong
sum.
"""

import random

import torch

from data import collate, encode, random_pairs, seen_sums
from model import completion_logps
from plots.study import runs
from plots.study.methods import at_best_settings
from plots.study.runs import BATCH, BETA, SEEDS, STEPS
from train_dpo import dpo_loss

PAIRS, PAIR_SEED = 2000, 1_000_003  # on which z is measured at the end


# ---- tokens that count -----------------------------------------------------------------------
# Each maps the tokens and the mask of rejected sides, (B, T) each, to the mask that counts.


def all_tokens(tokens, mask):
    return mask


def end_token(tokens, mask):
    return mask & (still_to_come(mask) == 1)


def first_terms(tokens, mask):
    """All up to the last plus sign."""
    plus = (tokens == encode("+")[0]) & mask
    return mask & (still_to_come(plus) > 0)


def last_term(tokens, mask):
    """The digits after the last plus sign."""
    return mask & ~first_terms(tokens, mask) & ~end_token(tokens, mask)


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


def wrong_sum(rng, completion):
    """One term changed by 1, 2, 3 or 10, and still positive: "10+30+3" -> "10+28+3"."""
    terms = [int(term) for term in completion.split("+")]
    i, change = rng.randrange(len(terms)), rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
    terms[i] += change if terms[i] + change > 0 else -change
    return "+".join(map(str, terms))


VARIANTS = {  # name: (tokens that count, rejected side)
    "offline": (all_tokens, as_it_is),
    "the terms before the last": (first_terms, as_it_is),
    "the last term": (last_term, as_it_is),
    "the end token": (end_token, as_it_is),
    "half wrong sums": (all_tokens, half_wrong_sums),
}


# ---- one run ---------------------------------------------------------------------------------


def four_logps(policy, reference, pairs, tokens_that_count):
    """The log-probs that dpo_loss takes; those of the rejected side count some tokens only."""
    chosen = collate([(x, chosen) for x, chosen, _ in pairs])
    tokens, mask = collate([(x, rejected) for x, _, rejected in pairs])
    rejected = tokens, tokens_that_count(tokens, mask)
    policy_logps = [completion_logps(policy, *side) for side in (chosen, rejected)]
    with torch.no_grad():
        ref_logps = [completion_logps(reference, *side) for side in (chosen, rejected)]
    return *policy_logps, *ref_logps


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
    optimizers = [runs.adamw(policy, lr)]
    for step in range(1, STEPS + 1):
        pairs = pairs_of(variant, rng, rng_of_sides, BATCH, sums)
        logps = four_logps(policy, reference, pairs, tokens_that_count)
        runs.update(optimizers, dpo_loss(*logps, BETA)[0].mean(), step, STEPS)
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
    """The content of interventions.json: every variant but "offline", which part 1 has."""
    runs.train_sft_models(pool, (0, *SEEDS))
    variants = {name: [{"variant": name}] for name in VARIANTS if name != "offline"}
    return at_best_settings(pool, run, variants, SEEDS)


if __name__ == "__main__":
    runs.run_part("interventions", interventions, __doc__)
