"""Part 5 of the study: a noisy judge, whose exact optimum is known. Do DPO and RL find it?

    python -m plots.study.judge            # writes judge.json

The judge errs as Bradley and Terry say: the preferred of two answers wins with probability
sigmoid(1), and either of two equals with probability 1/2. That is a reward of 1 for preferred
answers, so the optimum multiplies their odds by t = exp(1 / beta). DPO sees answers of the policy
(online), of the SFT model (reference) or, at one beta, half of each (mixed). The loss takes all
pairs of the answers to a prompt, with both verdicts weighted by their probabilities. RLOO sees the
reward of the policy's answers. All of them have the same optimum.
"""

import itertools
import math
import random

import torch

from data import collate, is_preferred, measure, seen_sums
from model import completion_logps, generate, logratios_of
from plots.study import frontier, runs
from plots.study.rlhf import rloo_loss
from train_dpo import LOSSES
from train_sft import make_optimizers

ONLINE = {"answers": "online", "loss": "sigmoid"}
REFERENCE = {"answers": "reference", "loss": "sigmoid"}
MIXED = {"answers": "mixed", "loss": "sigmoid"}
RLOO = {"answers": "online", "loss": "rloo"}
KINDS = (ONLINE, REFERENCE, RLOO)
# Of the winners; beta has no part in it.
IMITATION = {"answers": "reference", "loss": "imitation", "beta": 0.8, "lr": 7.5e-4}
BETAS = (0.3, 0.8, 2.0)
RATE_BETAS = BETAS[:2]  # at which a rate is chosen on seed 0; other beta take that of the nearest
SEEDS = (1, 2, 3)
RATES = (9.5e-5, 1.9e-4, 3.75e-4, 7.5e-4, 1.5e-3, 3e-3)
STEPS, PROMPTS, ANSWERS = 750, 8, 16  # as in part 1, 128 answers a step
SAMPLES = 50  # answers to every sum, to measure a run


def loss_of_all_pairs(logps, ref_logps, preferred, loss, beta):
    """The expected loss of all pairs of answers to a prompt, for (PROMPTS, ANSWERS) each.

    The first of a pair wins with probability p. A share 1 - p of the labels is the wrong way round,
    so label smoothing of 1 - p gives the expected loss.
    """
    i, j = torch.triu_indices(ANSWERS, ANSWERS, 1)
    p = (preferred[:, i].float() - preferred[:, j].float()).sigmoid()
    sides = logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j]
    return LOSSES[loss](*sides, beta, label_smoothing=1 - p)[0].mean()


def written(answers, policy, reference, prompts):
    """A completion of each prompt; "mixed": of every other prompt by the policy."""
    writers = {"online": (policy,), "reference": (reference,), "mixed": (policy, reference)}
    parts = writers[answers]
    completions = [generate(model, prompts[i :: len(parts)]) for i, model in enumerate(parts)]
    return [completion for side_by_side in zip(*completions) for completion in side_by_side]


def train(policy, reference, settings, seed):
    """Trains the policy on answers that `settings["answers"]` names, by `settings["loss"]`."""
    torch.manual_seed(seed)
    rng, sums = random.Random(seed), seen_sums(policy.config.max_sum)

    def next_loss():
        prompts = [f"{n}=" for n in rng.choices(sums, k=PROMPTS) for _ in range(ANSWERS)]
        if settings["loss"] == "rloo":
            beta = settings["beta"]
            return rloo_loss(policy, reference, prompts, reward, beta, ANSWERS)
        completions = written(settings["answers"], policy, reference, prompts)
        examples = list(zip(prompts, completions))
        batch = collate(examples)
        logps = completion_logps(policy, *batch)
        with torch.no_grad():
            ref_logps = completion_logps(reference, *batch)
        grids = (x.view(PROMPTS, ANSWERS) for x in (logps, ref_logps, reward(examples)))
        return loss_of_all_pairs(*grids, settings["loss"], settings["beta"])

    optimizers = make_optimizers(policy, settings["lr"])
    runs.train(optimizers, settings["lr"], settings["steps"], next_loss)


def reward(examples):
    """1 for preferred answers and 0 for others: (B,)."""
    return torch.tensor([float(is_preferred("".join(example), 3)) for example in examples])


def predict(p, settings):
    """The exact optimum: its mean share and KL, and its margin z in answers of the reference.

    p (sums,) is the reference's share of preferred answers. KL and z are in nats.
    """
    if settings["loss"] == "imitation":
        s = p * p + 2 * p * (1 - p) * torch.tensor(1.0).sigmoid()  # of the winners
    else:
        s = (p.logit() + 1 / settings["beta"]).sigmoid()
    of_preferred, of_others = (s / p).log(), ((1 - s) / (1 - p)).log()  # log-ratios, (sums,)
    z = (p * of_preferred).sum() / p.sum() - ((1 - p) * of_others).sum() / (1 - p).sum()
    kl = frontier.bernoulli_kl(s, p).mean()
    return {"preferred": s.mean().item(), "kl": kl.item(), "z": z.item()}


def run(settings, seed):
    """What a run ends at, beside the prediction."""

    def compute():
        policy, reference, p = runs.start(seed)
        train(policy, reference, settings, seed)
        generator = torch.Generator().manual_seed(seed)
        result = {"seed": seed, "predicted": predict(p, settings), "z": {}}
        for name, writer in (("reference", reference), ("policy", policy)):
            answers = runs.sampled_answers(writer, SAMPLES, generator)
            logratios = logratios_of(policy, reference, answers).double()
            preferred = torch.tensor([is_preferred(a, 3) for a in answers])
            parts = frontier.split_z(logratios, preferred, p)
            result["z"][name] = parts["z"]  # 1 / beta, at best
        result["z parts"] = parts  # of the policy's answers, as all that follows
        metrics = measure(answers, 3) | {"kl": logratios.mean().item()}
        return result | {key: metrics[key] for key in ("preferred", "exact", "kl")}

    return runs.kept(f"judge/{runs.name_of(settings, seed)}", compute)


def distance(result):
    return abs(result["preferred"] - result["predicted"]["preferred"])


def judge(pool):
    """The content of judge.json: the study, the choice of rates, and runs of twice the steps."""
    runs.train_sft_models(pool, (0, *SEEDS))

    def finish(title, settings, seeds):
        tasks = list(itertools.product(range(len(settings)), seeds))
        futures = {(i, seed): pool.submit(run, settings[i], seed) for i, seed in tasks}
        results = runs.gather(title, futures)
        of_settings = [[results[i, seed] for seed in seeds] for i in range(len(settings))]
        return [{"settings": s, "runs": found} for s, found in zip(settings, of_settings)]

    grid = [kind | {"beta": beta} for kind in KINDS for beta in BETAS]
    grid.append(MIXED | {"beta": BETAS[0]})
    rates = itertools.product([s for s in grid if s["beta"] in RATE_BETAS], RATES)
    checks = finish("rates", [s | {"steps": STEPS, "lr": lr} for s, lr in rates], [0])
    study = []
    for settings in grid:
        nearest = min(RATE_BETAS, key=lambda tried: abs(math.log(tried / settings["beta"])))
        wanted = (settings | {"beta": nearest}).items()
        tried = [check for check in checks if check["settings"].items() >= wanted]
        best = min(tried, key=lambda check: distance(check["runs"][0]))["settings"]
        study.append(best | {"beta": settings["beta"]})
    twice = [s | {"steps": 2 * STEPS} for s in study]
    study.append(IMITATION | {"steps": STEPS})
    longer = finish("twice the steps", twice, SEEDS[:1])
    return {"study": finish("study", study, SEEDS), "rates": checks, "longer": longer}


if __name__ == "__main__":
    runs.run_part("judge", judge)
