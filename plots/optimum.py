"""Does DPO find the exact optimum of plots/yardstick.py? Runs with a noisy judge.

    python -m plots.optimum           # or: make optimum; resumes where it stopped

The judge errs as Bradley and Terry say: the preferred of two answers wins with probability
sigmoid(1), and either of two equals with probability 1/2. That is a reward of 1 for preferred
answers, so DPO should multiply their odds by t = exp(1 / beta). Every prompt has many answers, and
the loss takes all their pairs, with both verdicts weighted by their probabilities. The results are
a section of plots/RESULTS.md.
"""

import json

import numpy as np
import torch
from tqdm import tqdm

import evaluate
from data import MIN_SUM, atomic_write, collate, is_preferred, measure, run_script, seen_sums
from model import completion_logps, generate, load_checkpoint
from plots import lesson, tables, yardstick
from train_dpo import averaged, dpo_loss
from train_sft import make_optimizers

RUNS = lesson.RUNS / f"optimum_{lesson.hash_of([__file__])}"
BETAS = (0.3, 0.5, 0.8, 1.3, 2.0)
SEEDS = (1, 2, 3)
RATES = (7.5e-4, 1.5e-3)  # to choose from on seed 0, at beta = 0.8
STEPS, PROMPTS, ANSWERS = 750, 16, 16
SAMPLES = 50  # answers to every sum, to measure a run


def loss_of_all_pairs(logps, ref_logps, preferred, settings):
    """The expected loss of all pairs of answers to a prompt, for (PROMPTS, ANSWERS) each.

    The first of a pair wins with probability p. A share 1 - p of the labels is the wrong way round,
    so label smoothing of 1 - p gives the expected loss.
    """
    i, j = torch.triu_indices(ANSWERS, ANSWERS, 1)
    p = (preferred[:, i].float() - preferred[:, j].float()).sigmoid()
    if settings["loss"] == "imitation":  # of the winners
        return -(p * logps[:, i] + (1 - p) * logps[:, j]).mean()
    sides = logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j]
    return dpo_loss(*sides, settings["beta"], label_smoothing=1 - p)[0].mean()


def train(policy, reference, settings, seed):
    """Returns the policy, trained on answers of its own ("online") or of the reference."""
    rng, sums = np.random.default_rng(seed), seen_sums(policy.config.max_sum)
    torch.manual_seed(seed)
    writer = policy if settings["pairs"] == "online" else reference
    optimizers = make_optimizers(policy, settings["lr"])
    average = averaged(policy)
    for step in range(settings["steps"]):
        # ---- batch: the answers to a prompt stand side by side
        prompts = [f"{n}=" for n in rng.choice(sums, PROMPTS) for _ in range(ANSWERS)]
        examples = list(zip(prompts, generate(writer, prompts)))
        tokens, completion_mask = collate(examples)
        preferred = torch.tensor([is_preferred("".join(example), 3) for example in examples])

        # ---- loss
        logps = completion_logps(policy, tokens, completion_mask)
        with torch.no_grad():
            ref_logps = completion_logps(reference, tokens, completion_mask)
        grids = (x.view(PROMPTS, ANSWERS) for x in (logps, ref_logps, preferred))
        loss = loss_of_all_pairs(*grids, settings)

        # ---- update, with the schedule and the average of train_dpo.py
        rise, fall = (step + 1) / (0.05 * settings["steps"]), 1 - step / settings["steps"]
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] * min(rise, 1, fall / 0.7)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(policy)
    return average.module


def predict(p, settings):
    """Mean share and KL in nats that the exact optimum has; p (sums,) is the reference's share."""
    if settings["loss"] == "imitation":
        share = p * p + 2 * p * (1 - p) * torch.tensor(1.0).sigmoid()  # of the winners
        return share.mean().item(), yardstick.bernoulli_kl(share, p).mean().item()
    return yardstick.optimal_policy(p, 1 / settings["beta"])


def run(settings, seed):
    """What a run ends at, beside the prediction; from its file if it is done."""
    torch.set_num_threads(1)
    flags = "_".join(f"{key}={value}" for key, value in settings.items())
    result_file = RUNS / f"{flags}_{seed}.json"
    if result_file.exists():
        return json.loads(result_file.read_text())
    p = torch.tensor(lesson.run({}, seed)["p"], dtype=torch.float64)
    policy, _ = load_checkpoint(lesson.RUNS / f"sft_{seed}.pt")
    reference, _ = load_checkpoint(lesson.RUNS / f"sft_{seed}.pt")
    policy = train(policy, reference, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    sums = np.repeat(range(MIN_SUM, policy.config.max_sum + 1), SAMPLES)
    share, kl = predict(p, settings)
    result = {"seed": seed, "predicted": {"preferred": share, "kl": kl}, "z": {}}
    for name, writer in (("reference", reference), ("policy", policy)):
        equations = evaluate.answer(writer, sums, generator=generator)
        logratios = evaluate.logratios_of(policy, reference, equations)
        preferred = torch.tensor([is_preferred(equation, 3) for equation in equations])
        z = logratios[preferred].mean() - logratios[~preferred].mean()
        result["z"][name] = z.item()  # 1 / beta at the optimum
    metrics = measure(equations, 3) | {"kl": logratios.mean().item()}  # of the policy's answers
    result |= {key: metrics[key] for key in ("preferred", "exact", "kl")}
    RUNS.mkdir(parents=True, exist_ok=True)
    atomic_write(result_file, json.dumps(result).encode())
    return result


def optimum(pool):
    """The content of optimum.json.

    Pairs of each source get the rate that comes nearest to the prediction on seed 0.
    """

    def finish(settings, seeds):
        futures = [[pool.submit(run, s, seed) for s in settings] for seed in seeds]
        by_seed = [[future.result() for future in tqdm(of_seed)] for of_seed in futures]
        return [{"settings": s, "runs": runs} for s, *runs in zip(settings, *by_seed)]

    start = {"loss": "sigmoid", "beta": 0.8, "steps": STEPS}
    checks, study = [], []
    for pairs in ("online", "reference"):
        tried = finish([{"pairs": pairs, **start, "lr": rate} for rate in RATES], [0])
        best = min(tried, key=lambda check: distance(check["runs"][0]))["settings"]
        checks += tried
        study += [best | {"beta": beta} for beta in BETAS]
    study.append(best | {"loss": "imitation"})
    online = [s for s in study if s["pairs"] == "online" and s["beta"] <= 0.8]
    longer = [s | {"steps": 2 * STEPS} for s in online]
    return {"study": finish(study, SEEDS), "checks": checks + finish(longer, SEEDS[:1])}


def distance(result):
    return abs(result["preferred"] - result["predicted"]["preferred"])


if __name__ == "__main__":
    run_script(lambda: lesson.write(tables.OPTIMUM, optimum))
