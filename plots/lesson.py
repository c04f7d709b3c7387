"""Every run behind the README's comparisons; a run that is done already is not run again.

    python plots/lesson.py            # or: make lesson; every run but those with a judge that errs
    python plots/lesson.py --judge    # or: make judge; these alone

Trains and measures one run a core, each with one thread, and leaves summary.json or judge.json in
runs/lesson for plots/tables.py. Every method gets the same steps, batches and learning rates to
choose from: the rate is chosen on seed 0 by the preferred share and reported over the other seeds.
"""

import argparse
import contextlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import evaluate  # noqa: E402
import train_dpo  # noqa: E402
import train_sft  # noqa: E402
from data import replacing, run_script  # noqa: E402
from model import load_checkpoint  # noqa: E402
from plots.tables import RUNS  # noqa: E402

SEEDS = (1, 2, 3, 4, 5)
RATES = ("1e-4", "3e-4", "1e-3", "3e-3")
METHODS = {  # name: flags, each tried with every rate; steps and batches are the default ones
    "imitation": ["--pairs offline --loss sft"],
    "offline": ["--pairs offline"],
    "offline + NLL": ["--pairs offline --nll-weight 1"],
    "offline, smoothed": ["--pairs offline --label-smoothing 0.1"],
    "offline, IPO": [f"--pairs offline --loss ipo --beta {beta}" for beta in (0.1, 0.8)],
    "reference": ["--pairs reference"],
    "reference + NLL": ["--pairs reference --nll-weight 1"],
    "online": ["--pairs online"],
    "online + NLL": ["--pairs online --nll-weight 1"],
    "on-policy": ["--pairs on-policy"],
}
EXERCISES = (
    "--pairs offline --lr 3e-3",
    "--pairs offline --lr 1e-3 --nll-weight 0.1",
    "--pairs online --preferred-terms 5",
)
# With a judge that errs: pairs of the policy and of the SFT model, over beta. The rate of each is
# the one that comes closest to the predicted share, on seed 0 and at one beta.
JUDGE = "--judge-reward 1 --answers 32 --batch-size 8"
JUDGE_STEPS = 4000
JUDGE_RATES = {"on-policy": ("5e-4", "1e-3", "2e-3"), "reference": ("1e-4", "2e-4", "5e-4")}
JUDGE_BETAS, JUDGE_BETA = ("0.3", "0.5", "0.8", "1.3", "2"), "0.8"
JUDGE_SEEDS = (1,)
BEST_OF = (2, 4, 8, 16)


def run(flags, seed, samples=100):
    """The result of one run, from its file if it is done; without flags a run of train_sft.py."""
    sft, out = RUNS / f"sft_{seed}.pt", RUNS / f"{name_of(flags)}_{seed}.pt"
    result_file = out.with_suffix(".json")
    if result_file.exists():
        return json.loads(result_file.read_text())
    torch.set_num_threads(1)
    train_sft.LOGGED = train_dpo.OWN_ANSWERS = 1  # a run is looked at when it is done
    script = train_dpo if flags else train_sft
    arguments = f"{flags} --seed {seed} --out {out}" + (f" --sft {sft}" if flags else "")
    if not out.exists():
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                script.main(script.parse_args(arguments.split()))
    model, args = load_checkpoint(out)
    reference, terms = load_checkpoint(sft)[0], args.get("preferred_terms", 3)
    if flags and terms == 3:
        p = torch.tensor(run("", seed)["p"], dtype=torch.float64)
    else:
        p = evaluate.preferred_shares(reference, terms, torch.Generator())
    result = evaluate.evaluate(model, reference, p, terms, samples, seed)
    result |= {"args": args, "seconds": evaluate.read_log(out)[-1]["seconds"]}
    if flags:
        result["tokens"] = evaluate.who_pays(model, reference, terms)["rejected"]
    else:
        result |= {"p": p.tolist(), "gap": evaluate.gap_to_floor(model)}
    with replacing(result_file) as (file,):
        file.write(json.dumps(result).encode())
    return result


def name_of(flags):
    return "_".join(flags.replace("--", "").split()) or "sft"


def results(title, futures):
    return [future.result() for future in tqdm(futures, desc=title)]


def main(args):
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        if args.judge:
            name, content = "judge", judge(pool)
        else:
            name, content = "summary", compare(pool)
    with replacing(RUNS / f"{name}.json") as (file,):
        file.write(json.dumps(content).encode())


def compare(pool):
    """All that is published of runs whose judge never errs."""
    sft = results("SFT", [pool.submit(run, "", seed) for seed in (0, *SEEDS)])
    methods = at_best_rates(pool)
    extra = {
        f"exercise {i}": [pool.submit(run, flags, SEEDS[0])]
        for i, flags in enumerate(EXERCISES, start=1)
    }
    return {
        "sft": sft[1:],
        "methods": methods,
        "extra": {name: results(name, futures) for name, futures in extra.items()},
        "frontier": frontier(sft[1:]),
    }


def at_best_rates(pool):
    """Every method at the best of the rates on seed 0, and its results over the other seeds."""
    tried = {
        name: [f"{flags} --lr {rate}" for flags in variants for rate in RATES]
        for name, variants in METHODS.items()
    }
    grid = {
        flags: pool.submit(run, flags, 0, 20) for variants in tried.values() for flags in variants
    }
    shares = [result["sampled"]["all"]["preferred"] for result in results("rates", grid.values())]
    shares, methods, futures = dict(zip(grid, shares)), {}, {}
    for name, variants in tried.items():
        best = max(variants, key=shares.get)
        methods[name] = {"flags": best, "rates": {flags: shares[flags] for flags in variants}}
        futures[name] = [pool.submit(run, best, seed) for seed in SEEDS]
    for name in methods:
        methods[name]["runs"] = results(name, futures[name])
    return methods


def judge(pool):
    """What came out with a judge that errs, beside what theory predicts."""
    results("SFT", [pool.submit(run, "", seed) for seed in (0, *JUDGE_SEEDS)])

    def submit(kind, seed, source, rate, beta=JUDGE_BETA, steps=JUDGE_STEPS, loss=""):
        flags = f"--pairs {source} {JUDGE} --steps {steps} --lr {rate} --beta {beta}{loss}"
        return kind, flags, seed, pool.submit(run, flags, seed)

    def off(job):
        record = judge_record(*job)
        return abs(record["preferred"] - record["share predicted"])

    tried = {
        source: {rate: submit("check", 0, source, rate) for rate in rates}
        for source, rates in JUDGE_RATES.items()
    }
    best = {source: min(jobs, key=lambda rate: off(jobs[rate])) for source, jobs in tried.items()}
    jobs = []
    for source, rate in best.items():
        jobs += tried[source].values()
        jobs.append(submit("check", 0, source, rate, steps=2 * JUDGE_STEPS))
        lowest, steepest = JUDGE_RATES[source][0], JUDGE_BETAS[0]
        jobs += [submit("check", s, source, lowest, steepest) for s in JUDGE_SEEDS]
        jobs += [submit("", s, source, rate, beta) for beta in JUDGE_BETAS for s in JUDGE_SEEDS]
    kind, rate = "imitation of the winners", best["reference"]
    jobs += [submit(kind, s, "reference", rate, loss=" --loss sft") for s in JUDGE_SEEDS]
    return [judge_record(*job) for job in tqdm(jobs, desc="judge")]


def judge_record(kind, flags, seed, future):
    """One such run, beside the optimum of its loss.

    For DPO that is the tilt by the judge's reward of 1; imitation becomes the winners themselves,
    of whom p^2 come from two preferred answers and 2 p (1 - p) sigmoid(1) from one.
    """
    result = future.result()
    args, sampled = result["args"], result["sampled"]["all"]
    p = torch.tensor(run("", seed)["p"], dtype=torch.float64)
    share, kl = evaluate.tilt(p, 1 / args["beta"])
    if args["loss"] == "sft":
        winners = p**2 + 2 * p * (1 - p) * torch.sigmoid(torch.tensor(1.0))
        share, kl = winners.mean().item(), evaluate.coin_kl(winners, p).mean().item()
    return {
        "kind": kind,
        "flags": flags,
        "source": args["pairs"],
        "beta": args["beta"],
        "share predicted": share,
        "preferred": sampled["preferred"],
        "exact": sampled["exact"],
        "KL predicted": kl,
        "KL": result["kl"]["total"][0],
    }


def frontier(sft):
    """The frontier and the best of n, averaged over seeds, for the figure."""
    ps = [torch.tensor(result["p"], dtype=torch.float64) for result in sft]
    curves = np.array([[evaluate.tilt(p, log_t) for log_t in np.linspace(0, 12, 100)] for p in ps])
    best = np.array([[evaluate.best_of(p, n) for n in BEST_OF] for p in ps])
    points = [[n, *point] for n, point in zip(BEST_OF, best.mean(0).tolist())]
    return {"curve": curves.mean(0).tolist(), "best of n": points}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train and measure the runs of the README.")
    parser.add_argument("--judge", action="store_true", help="those with a judge that errs")
    arguments = parser.parse_args()
    run_script(lambda: main(arguments))
