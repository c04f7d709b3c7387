"""Part 5 of the study: a noisy judge, whose exact optimum is known. Do DPO and RL find it?

    python -m plots.study.judge            # writes judge.json

The judge errs as Bradley and Terry say: the preferred of two answers wins with probability
sigmoid(1), and either of two equals with probability 1/2. That is a reward of 1 for preferred
answers, so the optimum multiplies their odds by t = exp(1 / beta). DPO sees answers of the policy
(online) or of the SFT model (reference). Its loss takes all pairs of the answers to a prompt, with
both verdicts weighted by their probabilities, so no verdict is drawn. RL sees the reward of the
policy's answers. All of them have the same optimum.
"""

import random

import torch

from data import collate, is_preferred, seen_sums
from model import completion_logps, generate
from plots.study import frontier, runs
from plots.study.methods import at_best_settings
from plots.study.runs import FEWER, STEPS
from train_dpo import dpo_loss, own_answers_loss
from train_sft import make_optimizers

KINDS = ("online DPO", "reference DPO", "RL")
BETAS = (0.3, 0.8)
PROMPTS, ANSWERS = 8, 16  # 128 answers per step


def reward(examples):
    """1 for preferred answers and 0 for others: (B,)."""
    return torch.tensor([float(is_preferred("".join(example), 3)) for example in examples])


def loss_of_all_pairs(logps, ref_logps, preferred, beta):
    """The expected loss of all pairs of answers to a prompt, for (PROMPTS, ANSWERS) each.

    The first of a pair wins with probability p. A share 1 - p of the labels is the wrong way round,
    so label smoothing of 1 - p gives the expected loss.
    """
    i, j = torch.triu_indices(ANSWERS, ANSWERS, 1)
    p = (preferred[:, i].float() - preferred[:, j].float()).sigmoid()
    sides = logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j]
    return dpo_loss(*sides, beta, label_smoothing=1 - p)[0].mean()


def judged_loss(policy, reference, writer, prompts, beta):
    """The DPO loss of answers of `writer` to prompts, each of which stands ANSWERS times."""
    examples = list(zip(prompts, generate(writer, prompts)))
    answers = collate(examples)
    logps = completion_logps(policy, *answers)
    with torch.no_grad():
        ref_logps = completion_logps(reference, *answers)
    grids = (x.view(PROMPTS, ANSWERS) for x in (logps, ref_logps, reward(examples)))
    return loss_of_all_pairs(*grids, beta)


def train(policy, reference, settings, seed):
    """Trains the policy as `settings` say: kind, beta and lr."""
    torch.manual_seed(seed)
    rng, sums = random.Random(seed), seen_sums(policy.config.max_sum)
    kind, beta = settings["kind"], settings["beta"]
    optimizers = make_optimizers(policy, settings["lr"])
    for step in range(1, STEPS + 1):
        prompts = [f"{n}=" for n in rng.choices(sums, k=PROMPTS) for _ in range(ANSWERS)]
        if kind == "RL":
            loss = own_answers_loss(policy, reference, prompts, beta, reward)
        else:
            writer = policy if kind == "online DPO" else reference
            loss = judged_loss(policy, reference, writer, prompts, beta)
        runs.update(optimizers, loss, step, STEPS)


def run(settings, seed):
    """What a run ends at, beside the optimum."""
    policy, reference, p = runs.start(seed)
    train(policy, reference, settings, seed)
    share, kl = frontier.optimal_policy(p, 1 / settings["beta"])
    optimum = {"preferred": share, "kl": kl}
    return runs.measured(policy, reference, p, seed) | {"optimum": optimum}


def nearest(tried):
    """The settings whose share of preferred answers is nearest to that of the optimum."""
    distances = [abs(r["sampled"]["preferred"] - r["optimum"]["preferred"]) for _, r in tried]
    return tried[distances.index(min(distances))][0]


def judge(pool):
    """The content of judge.json: every kind at every beta, and the rates that were tried."""
    ps = runs.train_sft_models(pool, (0, *FEWER))[1:]
    variants = {f"{k}, β = {b}": [{"kind": k, "beta": b}] for k in KINDS for b in BETAS}
    study = at_best_settings(pool, run, variants, FEWER, nearest)
    return {"study": study, "curve": curve(ps)}


def curve(ps):
    """[beta, share of the optimum], averaged over seeds, for the figure."""
    ps = torch.tensor(ps, dtype=torch.float64)
    betas = torch.linspace(0.2, 1.2, 51).tolist()
    return [[beta, frontier.optimal_policy(ps.flatten(), 1 / beta)[0]] for beta in betas]


if __name__ == "__main__":
    runs.run_part("judge", judge, __doc__)
