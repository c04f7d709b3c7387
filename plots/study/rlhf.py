"""Part 2 of the study: RLHF on offline pairs, the long way round that DPO cuts short.

    python -m plots.study.rlhf

It writes rlhf.json. First a reward model learns from the offline pairs which side is chosen (arXiv
2203.02155, eq. 1). Then the policy writes answers itself and learns from their rewards by policy
gradient. Its loss is that of `train_dpo.py --kl-weight`, with the learned reward in place of the
pairs:

    beta KL(pi || pi_ref) - r(x, y)

Steps, batches, optimizer and learning rates to choose from are those of the methods of part 1. We
left out a value function, clipping, and several updates on the same answers.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from data import PROMPT_WIDTH, collate, random_pairs, seen_sums
from model import save_checkpoint
from plots.study import runs
from plots.study.runs import BATCH, BETA, SEEDS, STEPS, wrong_sum
from train_dpo import own_answers_loss

REWARD_LR = 1e-3
LOOKS = (8, 16, 31, 62, 125, 250, 375, 500)  # steps at which the path is measured


# ---- the reward model ------------------------------------------------------------------------


def rewards_of(reward_model, examples):
    """r(x, y) of examples (prompt, completion), read at the last token of each: (B,)."""
    tokens, completion_mask = collate(examples)
    rewards = reward_model(tokens)[:, :, 0]  # (B, T)
    last = PROMPT_WIDTH + completion_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.gather(1, last)[:, 0]


def new_reward_model(seed):
    """The SFT model with one output in place of the logits, zero at first."""
    reward_model, _, _ = runs.start(seed)
    reward_model.head = nn.Linear(reward_model.config.width, 1, bias=False)
    nn.init.zeros_(reward_model.head.weight)
    return reward_model


def train_reward_model(reward_model, seed):
    """By -log sigmoid(r_chosen - r_rejected)."""
    rng, sums = random.Random(seed), seen_sums(reward_model.config.max_sum)
    optimizer = runs.adamw(reward_model, REWARD_LR)
    for step in range(1, STEPS + 1):
        pairs = random_pairs(rng, BATCH, sums, 3)
        chosen = rewards_of(reward_model, [(x, chosen) for x, chosen, _ in pairs])
        rejected = rewards_of(reward_model, [(x, rejected) for x, _, rejected in pairs])
        loss = -F.logsigmoid(chosen - rejected).mean()
        runs.update(optimizer, loss, step, STEPS)


def reward_model_of(seed):
    """The reward model of a seed, trained unless it lies beside the kept results of this code."""
    reward_model, path = new_reward_model(seed), runs.path_of(learn_rewards, (seed,))
    path = path.with_suffix(".pt")
    if not path.exists():
        train_reward_model(reward_model, seed)
        save_checkpoint(path, reward_model, {}, [])
    reward_model.load_state_dict(torch.load(path)["model"])
    return reward_model


def kinds_of_answers(seed, sums):
    """{kind: examples}: exact and wrong sums, with three terms and with others."""
    rng = random.Random(seed)
    pairs = random_pairs(rng, 1000, sums, 3)
    three, other = [(x, chosen) for x, chosen, _ in pairs], [(x, side) for x, _, side in pairs]
    return {
        "3 terms, exact": three,
        "other count, exact": other,
        "3 terms, wrong": [(x, wrong_sum(rng, side)) for x, side in three],
        "other count, wrong": [(x, wrong_sum(rng, side)) for x, side in other],
    }


def learn_rewards(seed):
    """The mean reward by kind of answer."""
    reward_model = reward_model_of(seed)
    kinds = kinds_of_answers(seed, seen_sums(reward_model.config.max_sum))
    with torch.no_grad():
        return {kind: rewards_of(reward_model, kinds[kind]).mean().item() for kind in kinds}


# ---- the policy ------------------------------------------------------------------------------


def run(settings, seed):
    """The result of a policy that is trained with the learned reward, and its path from step 0."""
    policy, reference, p = runs.start(seed)
    looks = train_policy(policy, reference, reward_model_of(seed), settings, seed)
    return runs.measured(policy, reference, p, seed) | {"looks": looks}


def train_policy(policy, reference, reward_model, settings, seed):
    """Policy gradient on the learned reward. Returns the path of the policy."""
    torch.manual_seed(seed)
    rng, sums = random.Random(seed), seen_sums(policy.config.max_sum)
    optimizer, path = runs.adamw(policy, settings["lr"]), [runs.look(policy, reference, 0)]

    def reward(examples):
        return rewards_of(reward_model, examples)

    for step in range(1, STEPS + 1):
        prompts = [f"{n}=" for n in rng.choices(sums, k=BATCH)]
        loss = own_answers_loss(policy, reference, prompts, settings["beta"], reward)
        runs.update(optimizer, loss, step, STEPS)
        if step in LOOKS:
            path.append(runs.look(policy, reference, step))
    return path


def rlhf(pool):
    """The content of rlhf.json: the mean rewards, and two rows like those of part 1."""
    runs.train_sft_models(pool, (0, *SEEDS))
    seeds = [(seed,) for seed in (0, *SEEDS)]
    rewards = runs.gather(pool, "reward models", learn_rewards, {"rewards": seeds})["rewards"]
    rows = {"RLHF": {"beta": BETA}, "RLHF without the KL": {"beta": 0}}
    return {"rewards": rewards[1:], "methods": runs.at_best_rate(pool, run, rows, SEEDS)}


if __name__ == "__main__":
    runs.run_part("rlhf", rlhf)
