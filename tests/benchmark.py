"""How fast the scripts are on this machine, and how near to what its cores can do.

    make bench          # prints a table, line by line, in at most five minutes

Times the real scripts, each in processes of its own, several times over, and quotes medians. Rates
leave out the start of a run. Compare ratios within one run, not figures of two: machines drift.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import collate, random_equations, seen_sums  # noqa: E402
from model import GPT, GPTConfig, completion_logps, generate, load_checkpoint  # noqa: E402

REPEATS = 3
STEPS = 60  # of every run
CORES = os.cpu_count()


def log_of(script, flags, out, processes=1):
    """Runs a script with all cores shared among its processes: the records of its log."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / script, *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
    process = subprocess.run(
        [*command, "--steps", str(STEPS), "--out", out], env=environment, capture_output=True
    )
    if process.returncode:
        sys.exit(f"{script} failed:\n{process.stderr.decode()}")
    return [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]


def show_rate(name, unit, script, flags, out, processes=1):
    """Prints `unit` per second: over runs the median, of each the rate after its first fifth."""
    rates = []
    for _ in range(REPEATS):
        log = log_of(script, flags, out, processes)
        start, end = log[len(log) // 5], log[-1]
        rates.append((end[unit] - start[unit]) / (end["seconds"] - start["seconds"]))
    show(name, statistics.median(rates), f"{unit}/s, {min(rates):,.0f} to {max(rates):,.0f}")


def show(name, value, unit):
    print(f"{name:<50}{value:>10,.0f} {unit}", flush=True)


def median_time(work, seconds=1.0):
    times = []
    while sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    torch.set_num_threads(CORES)
    rng, sums, model = np.random.default_rng(0), seen_sums(), GPT(GPTConfig())
    for m, k, n in ((2048, 2048, 2048), (800, 48, 192), (800, 192, 48)):
        a, b = torch.randn(m, k), torch.randn(k, n)
        seconds = median_time(lambda a=a, b=b: a @ b)
        show(f"matrix product {m} x {k} x {n}", 2e-9 * m * k * n / seconds, "GFLOP/s")

    def forward_and_backward():
        completion_logps(model, *collate(random_equations(rng, 256, sums))).mean().backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        median_time(forward_and_backward, seconds=2)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    for operator in sorted(times, key=times.get, reverse=True)[:8]:
        show(f"  {operator}", 100 * times[operator] / sum(times.values()), "% of SFT's operators")

    with tempfile.TemporaryDirectory() as folder:
        sft, small, dpo = (Path(folder) / name for name in ("sft.pt", "small.pt", "dpo.pt"))
        for processes in (1, CORES) if CORES > 1 else (1,):
            name = f"SFT, batch 256, {processes} x {CORES // processes} threads"
            show_rate(name, "equations", "train_sft.py", "", sft, processes)
        log_of("train_sft.py", "--depth 4 --width 64", small)
        for pairs, name, path in (
            ("offline", "default", sft),
            ("online", "default", sft),
            ("offline", "4 x 64", small),
        ):
            flags = f"--pairs {pairs} --sft {path}"
            show_rate(f"DPO, {pairs}, {name} model", "pairs", "train_dpo.py", flags, dpo)
        model, _ = load_checkpoint(sft)
    prompts = [f"{n}=" for n in range(5, 101)] * 10
    seconds = median_time(lambda: generate(model, prompts), seconds=5)
    show("generation, 960 answers at a time", len(prompts) / seconds, "answers/s")


if __name__ == "__main__":
    main()
