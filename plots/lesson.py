"""Every run behind plots/RESULTS.md, one a core; a run that is done already is not run again.

    python -m plots.lesson            # or: make lesson

Trains and measures, then writes plots/published.json. Every method gets the same steps, batches and
learning rates to choose from. The rate is chosen on seed 0 by the share of preferred answers and
reported over the other seeds. Results are kept for this code only: a change of it trains anew.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import evaluate
import model
import train_dpo
import train_sft
from data import END, MIN_SUM, atomic_write, collate, encode, is_exact
from data import entropy_floor, is_preferred, measure, random_equations, random_pairs
from data import run_script, seen_sums
from model import load_checkpoint
from plots import figures, tables, yardstick


def hash_of(files):
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:8]


CODE = [module.__file__ for module in (data, model, train_sft, train_dpo)]
RUNS = Path("runs/lesson", hash_of(CODE))
SEEDS = (1, 2, 3, 4, 5)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
METHODS = {  # name: settings, each tried at every rate; all else is the default of train_dpo.py
    "offline": [{"pairs": "offline"}],
    "offline + NLL": [{"pairs": "offline", "nll-weight": 1}],
    "mistakes": [{"pairs": "mistakes"}],
    "mistakes + NLL": [{"pairs": "mistakes", "nll-weight": 1}],
    "online": [{"pairs": "online"}],
    "reference": [{"pairs": "reference"}],
    "reference + NLL": [{"pairs": "reference", "nll-weight": 1}],
    "imitation": [{"pairs": "offline", "loss": "sft"}],
    "offline, IPO": [{"pairs": "offline", "loss": "ipo", "beta": beta} for beta in (0.1, 0.8)],
    "offline, smoothed": [{"pairs": "offline", "label-smoothing": 0.1}],
}
SAMPLES = 100  # answers to every sum; a fifth of them where only the rate is chosen
OUTSIDE = [2, 3, 4, *range(101, 111)]  # sums that training never has
EQUATIONS, EQUATION_SEED = 20_000, 1_000_004  # on which the gap of SFT is measured
PAIRS, PAIR_SEED = 2000, 1_000_003  # offline pairs whose two sides every model is asked about
BEST_OF = (2, 4, 8, 16)


def run(settings, seed):
    """The result of one run, from its file if it is done; without settings, of train_sft.py."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    name = "_".join(["dpo", *flags]).replace("--", "") if settings else "sft"
    out, sft = RUNS / f"{name}_{seed}.pt", RUNS / f"sft_{seed}.pt"
    result_file = out.with_suffix(".json")
    if result_file.exists():
        return json.loads(result_file.read_text())
    torch.set_num_threads(1)
    if not out.exists():
        script = train_dpo if settings else train_sft
        flags += [f"--seed={seed}", f"--out={out}"] + [f"--sft={sft}"] * bool(settings)
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                script.main(script.parse_args(flags))
    policy, args = load_checkpoint(out)
    reference, _ = load_checkpoint(sft)
    result = {"seed": seed, "settings": settings, "p": None, "gap": None}
    if settings:
        p = torch.tensor(run({}, seed)["p"], dtype=torch.float64)
    else:
        p = yardstick.preferred_shares(reference, 3)
        result |= {"p": p.tolist(), "gap": gap_to_floor(policy)}
    result |= study(policy, reference, p, seed, SAMPLES if seed in SEEDS else SAMPLES // 5)
    log = evaluate.read_log(out, args["steps"])
    result["seconds"] = evaluate.training_seconds(log)
    if settings:
        kept = ("kl", "preferred", "exact")
        result["looks"] = [
            {"step": r["step"]} | {k: r["own"][k] for k in kept} for r in figures.looks_of(log)
        ]
    atomic_write(result_file, json.dumps(result).encode())
    return result


def study(policy, reference, p, seed, samples):
    """All that the pages say of one model."""
    generator = torch.Generator().manual_seed(seed)
    max_sum = policy.config.max_sum
    sums = np.arange(MIN_SUM, max_sum + 1)
    sampled = evaluate.answer(policy, np.repeat(sums, samples), generator=generator)
    logratios = evaluate.logratios_of(policy, reference, sampled)
    result = evaluate.evaluate(policy, sampled, logratios, 3, seed)
    preferred = torch.tensor([is_preferred(equation, 3) for equation in sampled])
    shape = len(sums), samples
    result["kl parts"] = yardstick.split_kl(logratios.view(shape), preferred.view(shape), p)
    exact = np.reshape([is_exact(equation) for equation in sampled], shape).mean(1)
    result["worst sum"] = [int(sums[exact.argmin()]), float(exact.min())]
    for name, asked in (("largest", [max_sum] * 10), ("outside", OUTSIDE)):
        answers = evaluate.answer(policy, np.repeat(asked, samples), generator=generator)
        result[name] = measure(answers, 3)["exact"]
    pairs = random_pairs(np.random.default_rng(PAIR_SEED), PAIRS, seen_sums(max_sum), 3)
    result["offline pairs"] = mean_logratios(policy, reference, p, pairs)
    return result | {"next token": next_token(policy, pairs)}


def mean_logratios(policy, reference, p, pairs):
    """Mean log pi - log pi_ref of both sides of pairs, and the ceiling of the chosen, in nats."""
    sides = {
        "chosen": [prompt + chosen for prompt, chosen, _ in pairs],
        "rejected": [prompt + rejected for prompt, _, rejected in pairs],
    }
    means = {
        side: evaluate.logratios_of(policy, reference, equations).mean().item()
        for side, equations in sides.items()
    }
    asked = torch.tensor([int(prompt[:-1]) for prompt, _, _ in pairs])
    return means | {"ceiling": -p[asked - MIN_SUM].log().mean().item()}


def gap_to_floor(policy):
    """Nats per equation by which the loss on new equations exceeds their entropy floor."""
    rng = np.random.default_rng(EQUATION_SEED)
    equations = ["".join(example) for example in random_equations(rng, EQUATIONS, seen_sums())]
    return -evaluate.logps_of(policy, equations).mean().item() - entropy_floor(equations)


@torch.no_grad()
def next_token(policy, pairs):
    """Mean probabilities of the next token in the rejected side of pairs, which is right.

    After the last digit, where the sum is complete, and before it.
    """
    tokens, _ = collate([(prompt, rejected) for prompt, _, rejected in pairs])
    probabilities = policy(tokens).softmax(-1)  # (B, T, V)
    rows, ends = torch.arange(len(pairs)), (tokens == END).nonzero()[:, 1]
    after, before = probabilities[rows, ends - 1], probabilities[rows, ends - 2]  # (B, V)
    digits = before[:, :10].sum(1)
    right = before[rows, tokens[rows, ends - 1]]
    means = {
        "end": after[:, END],
        "plus sign": after[:, encode("+")[0]],
        "digit": after[:, :10].sum(1),
        "right digit": right,
        "other digit": digits - right,
    }
    return {name: p.mean().item() for name, p in means.items()}


def results(title, futures):
    return [future.result() for future in tqdm(futures, desc=title)]


def lesson(pool):
    """The content of published.json."""
    sft = results("SFT", [pool.submit(run, {}, seed) for seed in (0, *SEEDS)])
    grid = {
        name: [settings | {"lr": rate} for settings in variants for rate in RATES]
        for name, variants in METHODS.items()
    }
    tried = {name: [pool.submit(run, settings, 0) for settings in grid[name]] for name in grid}
    methods, futures = {}, {}
    for name in grid:
        shares = [r["sampled"]["preferred"] for r in results(f"{name}: rates", tried[name])]
        best = grid[name][int(np.argmax(shares))]
        methods[name] = {"settings": best, "tried": list(zip(grid[name], shares))}
        futures[name] = [pool.submit(run, best, seed) for seed in SEEDS]
    for name in grid:
        methods[name]["runs"] = results(name, futures[name])
    return {
        "processor": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "sft": sft[1:],
        "methods": methods,
        "frontier": frontier(sft[1:]),
    }


def frontier(sft):
    """The frontier and the best of n, averaged over seeds, for the figure."""
    ps = [torch.tensor(result["p"], dtype=torch.float64) for result in sft]
    log_ts = np.linspace(0, 12, 100)
    curves = [[yardstick.optimal_policy(p, log_t) for log_t in log_ts] for p in ps]
    best = [[yardstick.best_of(p, n) for n in BEST_OF] for p in ps]
    points = [[n, *point] for n, point in zip(BEST_OF, np.mean(best, axis=0).tolist())]
    return {"curve": np.mean(curves, axis=0).tolist(), "best of n": points}


def write(path, study):
    """Writes the content that `study` gets from runs, one a core."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        content = study(pool)
    atomic_write(path, json.dumps(content).encode())
    print(f"Wrote {path}; make publish writes the pages from it.")


if __name__ == "__main__":
    run_script(lambda: write(tables.PUBLISHED, lesson))
