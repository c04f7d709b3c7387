"""Part 3 of the study: why the classic pairs fail, by taking away what is suspected.

    python -m plots.study.interventions            # writes interventions.json

Every variant is `offline` of train_dpo.py, with one change. Either some tokens of the rejected side
are left out of its log-prob, in policy and reference alike; or the rejected sides are others.
"""

import random

import torch

from data import collate, composition, encode, random_pairs, seen_sums
from model import completion_logps
from plots.study import runs
from train_dpo import dpo_loss

BETA, STEPS, BATCH = 0.8, 500, 128  # the defaults of train_dpo.py
SEEDS = (1, 2, 3)
RATES = (3e-4, 1e-4)  # that of offline, and one more as a check, on the first seed
PAIRS, PAIR_SEED = 2000, 1_000_003  # on which loss and z are measured at the end


# ---- tokens that are left out ----------------------------------------------------------------
# Each maps the tokens and the mask of rejected sides, (B, T) each, to the mask that counts.


def all_tokens(tokens, mask):
    return mask


def without_last(number):
    """Leaves out the last `number` tokens of every completion; the end token is the last."""

    def masked(tokens, mask):
        still_to_come = mask.flip(1).cumsum(1).flip(1)  # of the completion, this one included
        return mask & (still_to_come > number)

    return masked


def without_last_term(tokens, mask):
    """Leaves out the digits after the last plus sign, and the end token."""
    plus = (tokens == encode("+")[0]) & mask
    return mask & (plus.flip(1).cumsum(1).flip(1) > 0)


def end_alone(tokens, mask):
    return mask & ~without_last(1)(tokens, mask)


# ---- other rejected sides --------------------------------------------------------------------
# Each maps a random state and a pair of the generator to the rejected side that is used.


def as_written(rng, pair):
    return pair[2]


def of_terms(k):
    return lambda rng, pair: composition(rng, int(pair[0][:-1]), k)


def wrong_sums(share):
    """A share of the rejected sides has a wrong sum: one side of the pair with one term changed."""
    return lambda rng, pair: (
        wrong_sum(rng, rng.choice(pair[1:])) if rng.random() < share else pair[2]
    )


def wrong_sum(rng, completion):
    """One term changed by 1, 2, 3 or 10, and still positive: "10+30+3" -> "10+28+3"."""
    terms = [int(term) for term in completion.split("+")]
    i, change = rng.randrange(len(terms)), rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
    terms[i] += change if terms[i] + change > 0 else -change
    return "+".join(map(str, terms))


VARIANTS = {  # name: (tokens that count, rejected side)
    "offline": (all_tokens, as_written),
    "without the end token": (without_last(1), as_written),
    "without the last digit and the end": (without_last(2), as_written),
    "without the last term and the end": (without_last_term, as_written),
    "the end token alone": (end_alone, as_written),
    "two terms": (all_tokens, of_terms(2)),
    "four terms": (all_tokens, of_terms(4)),
    "five terms": (all_tokens, of_terms(5)),
    "two terms, cut": (without_last(2), of_terms(2)),  # may begin a preferred answer
    "four terms, cut": (without_last(2), of_terms(4)),  # has too many plus signs for that
    "half wrong sums": (all_tokens, wrong_sums(0.5)),
    "nine in ten wrong sums": (all_tokens, wrong_sums(0.9)),
}


# ---- one run ---------------------------------------------------------------------------------


def z_of_pairs(policy, reference, pairs, tokens_that_count):
    """The four log-probs of pairs, of which the rejected ones count some tokens only."""
    chosen = collate([(x, chosen) for x, chosen, _ in pairs])
    tokens, mask = collate([(x, rejected) for x, _, rejected in pairs])
    rejected = tokens, tokens_that_count(tokens, mask)
    policy_logps = [completion_logps(policy, *side) for side in (chosen, rejected)]
    with torch.no_grad():
        ref_logps = [completion_logps(reference, *side) for side in (chosen, rejected)]
    return *policy_logps, *ref_logps


def train(policy, reference, variant, lr, seed):
    tokens_that_count, rejected_side = VARIANTS[variant]
    rng, rng_of_sides = random.Random(seed), random.Random(seed)
    sums = seen_sums(policy.config.max_sum)

    def next_pairs(rng, count):
        pairs = random_pairs(rng, count, sums, 3)
        return [(*pair[:2], rejected_side(rng_of_sides, pair)) for pair in pairs]

    def next_loss():
        logps = z_of_pairs(policy, reference, next_pairs(rng, BATCH), tokens_that_count)
        return dpo_loss(*logps, BETA)[0].mean()

    runs.train(runs.adamw(policy), lr, STEPS, next_loss)
    with torch.no_grad():
        pairs = next_pairs(random.Random(PAIR_SEED), PAIRS)
        logps = z_of_pairs(policy, reference, pairs, tokens_that_count)
        losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, BETA)
    z = (chosen_rewards - rejected_rewards) / BETA
    return {"loss": losses.mean().item(), "z of pairs": z.mean().item()}


def run(variant, lr, seed):
    def compute():
        policy, reference, p = runs.start(seed)
        reached = train(policy, reference, variant, lr, seed)
        return runs.measured(policy, reference, p, seed) | reached

    return runs.kept(f"{variant.replace(' ', '_')}_lr={lr}_{seed}", compute)


def interventions(pool):
    """The content of interventions.json: {"runs": {variant: results}, "check": the same}."""
    runs.train_sft_models(pool, SEEDS)
    lr, other = RATES
    tasks = [(variant, lr, seed) for seed in SEEDS for variant in VARIANTS]
    tasks += [(variant, other, SEEDS[0]) for variant in VARIANTS]
    results = runs.gather("variants", {task: pool.submit(run, *task) for task in tasks})
    return {
        str(rate): {
            variant: [r for task, r in results.items() if task[:2] == (variant, rate)]
            for variant in VARIANTS
        }
        for rate in RATES
    }


if __name__ == "__main__":
    runs.run_part("interventions", interventions)
