"""Part 2 of the study: RLHF on the classic pairs, the long way round that DPO cuts short.

    python -m plots.study.rlhf            # writes rlhf.json

First a reward model learns from the offline pairs which side is chosen (arXiv 2203.02155, eq. 1).
Then the policy writes answers itself and learns from their rewards, by REINFORCE with a baseline
that leaves one out (RLOO, arXiv 2402.14740). The reward of an answer y to x is

    r(x, y) - beta (log pi(y|x) - log pi_ref(y|x)),

so the policy is held near the reference by the KL of what it writes. Steps, batches, optimizer and
learning rates to choose from are those of the methods of part 1. We left out a value function,
clipping, and several updates on the same answers.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from data import PROMPT_WIDTH, collate, is_exact, random_pairs, seen_sums
from model import answer, chunks_of, completion_logps, generate
from plots.study import methods, runs
from plots.study.interventions import wrong_sum

BETA = 0.8
STEPS, BATCH = 500, 128  # pairs a step of the reward model, and answers a step of the policy
ANSWERS = 4  # to each prompt
REWARD_LR = 1e-3
OTHER_LR = 1e-3  # a check of the choice of the policy's rate, over all seeds as well
LOOKS = (8, 16, 31, 62, 125, 250, 375, 500)  # steps at which the path is measured


# ---- the two stages --------------------------------------------------------------------------


def rewards_of(reward_model, examples):
    """r(x, y) of examples (prompt, completion), read at the last token of each: (B,)."""
    tokens, completion_mask = collate(examples)
    rewards = reward_model(tokens)[:, :, 0]  # (B, T)
    last = PROMPT_WIDTH + completion_mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.gather(1, last)[:, 0]


def train_reward_model(reward_model, seed):
    """Turns an SFT model into a reward model, by -log sigmoid(r_chosen - r_rejected)."""
    reward_model.head = nn.Linear(reward_model.config.width, 1, bias=False)
    nn.init.zeros_(reward_model.head.weight)
    rng, sums = random.Random(seed), seen_sums(reward_model.config.max_sum)

    def next_loss():
        pairs = random_pairs(rng, BATCH, sums, 3)
        chosen = rewards_of(reward_model, [(x, chosen) for x, chosen, _ in pairs])
        rejected = rewards_of(reward_model, [(x, rejected) for x, _, rejected in pairs])
        return -F.logsigmoid(chosen - rejected).mean()

    runs.train(runs.adamw(reward_model), REWARD_LR, STEPS, next_loss)


def rloo_loss(policy, reference, prompts, reward, beta, answers=ANSWERS):
    """The policy gradient of answers to `prompts`, in which each prompt stands `answers` times.

    `reward` maps examples to (B,). The baseline of an answer is the mean of the others.
    """
    examples = list(zip(prompts, generate(policy, prompts)))
    batch = collate(examples)
    logps = completion_logps(policy, *batch)  # (B,)
    with torch.no_grad():
        kl = logps - completion_logps(reference, *batch)
        returns = (reward(examples) - beta * kl).view(-1, answers)  # (prompts, answers)
        mean_of_others = (returns.sum(1, keepdim=True) - returns) / (answers - 1)
        advantages = (returns - mean_of_others).flatten()  # (B,)
    return -(advantages * logps).mean()


def train_policy(policy, reference, reward_model, lr, beta, seed):
    """RLOO with the learned reward. Returns the path of the policy, from step 0 on."""
    torch.manual_seed(seed)
    rng, sums = random.Random(seed), seen_sums(policy.config.max_sum)
    path = [runs.look(policy, reference, 0)]

    def next_loss():
        prompts = [f"{n}=" for n in rng.choices(sums, k=BATCH // ANSWERS) for _ in range(ANSWERS)]
        return rloo_loss(policy, reference, prompts, lambda e: rewards_of(reward_model, e), beta)

    def after_step(step):
        if step in LOOKS:
            path.append(runs.look(policy, reference, step))

    runs.train(runs.adamw(policy), lr, STEPS, next_loss, after_step)
    return path


# ---- what is measured ------------------------------------------------------------------------


def kinds_of_answers(seed, sums):
    """{kind: examples}: right and wrong sums, with three terms and with others."""
    rng = random.Random(seed)
    pairs = random_pairs(rng, 1000, sums, 3)
    three, other = [(x, chosen) for x, chosen, _ in pairs], [(x, side) for x, _, side in pairs]
    return {
        "3 terms, right": three,
        "other count, right": other,
        "3 terms, wrong": [(x, wrong_sum(rng, side)) for x, side in three],
        "other count, wrong": [(x, wrong_sum(rng, side)) for x, side in other],
    }


@torch.no_grad()
def about_rewards(reward_model, reference, seed):
    """Mean and deviation of the learned reward by kind of answer, and an estimate of its optimum.

    The optimum weighs answers of the reference to a sum by exp(r / beta) (arXiv 2305.18290, eq. 4).
    """
    sums = seen_sums(reference.config.max_sum)
    result = {}
    for kind, examples in kinds_of_answers(seed, sums).items():
        rewards = rewards_of(reward_model, examples)
        result[kind] = [rewards.mean().item(), rewards.std().item()]
    samples, generator = runs.SAMPLES, torch.Generator().manual_seed(seed)
    answers = answer(reference, [n for n in sums for _ in range(samples)], generator=generator)
    rewards = torch.cat([rewards_of(reward_model, chunk) for chunk in chunks_of(answers)])
    scaled = (rewards.double() / BETA).view(-1, samples)  # (sums, samples)
    weights = scaled.softmax(1)
    exact = torch.tensor([is_exact(a) for a in answers]).view(-1, samples)
    three = torch.tensor([a.count("+") == 2 for a in answers]).view(-1, samples)
    log_mean = scaled.logsumexp(1) - torch.tensor(samples).double().log()
    result["optimum"] = {
        "preferred": (weights * (exact & three)).sum(1).mean().item(),
        "exact": (weights * exact).sum(1).mean().item(),
        "kl": ((weights * scaled).sum(1) - log_mean).mean().item(),
    }
    return result


def run(lr, beta, seed):
    """The result of one run, both stages."""

    def compute():
        policy, reference, p = runs.start(seed)
        reward_model, _, _ = runs.start(seed)
        train_reward_model(reward_model, seed)
        looks = train_policy(policy, reference, reward_model, lr, beta, seed)
        samples = runs.SAMPLES if seed in methods.SEEDS else runs.SAMPLES // 5
        result = methods.asked_of(policy, reference, p, seed, samples)
        return result | {"rewards": about_rewards(reward_model, reference, seed), "looks": looks}

    return runs.kept(f"rlhf_{runs.name_of({'lr': lr, 'beta': beta}, seed)}", compute)


def rlhf(pool):
    """The content of rlhf.json: like a method of part 1."""
    runs.train_sft_models(pool, (0, *methods.SEEDS))
    tried = runs.gather("rates", {lr: pool.submit(run, lr, BETA, 0) for lr in methods.RATES})
    tried = [({"lr": lr}, result) for lr, result in tried.items()]
    best = methods.best_of(tried)
    content = {"settings": best, "tried": methods.shares_of(tried), "other lr": OTHER_LR}
    settings = {  # name: (lr, beta, seeds)
        "runs": (best["lr"], BETA, methods.SEEDS),
        "other": (OTHER_LR, BETA, methods.SEEDS),
        "without kl": (best["lr"], 0, methods.FEWER),
    }
    for name, (lr, beta, seeds) in settings.items():
        results = runs.gather(name, {seed: pool.submit(run, lr, beta, seed) for seed in seeds})
        content[name] = list(results.values())
    return content


if __name__ == "__main__":
    runs.run_part("rlhf", rlhf)
