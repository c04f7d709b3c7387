"""How fast the scripts are on this machine, and how near to what its cores can do.

    make bench                         # a table, plots/benchmark.json and plots/benchmark.png

Times the real scripts, each in processes of its own, several times over; quotes medians. Rates
leave out the start of a run. Compare ratios within one run, not figures of two: machines drift.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import collate, random_equations, random_pairs, replacing, seen_sums  # noqa: E402
from model import GPT, GPTConfig, completion_logps, generate  # noqa: E402
from plots.figures import STYLE  # noqa: E402

REPEATS = 3
STEPS = 60  # of every run
CORES = os.cpu_count()


def run(script, *flags, processes=1, threads=CORES):
    """Runs a script in a folder of its own: the records of its log and its peak memory in MiB."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        ROOT / script,
        *map(str, flags),
    ]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.pt"
        process = subprocess.Popen(
            [*command, "--out", out],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{script} failed:\n{errors}")
        log = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    return log, usage.ru_maxrss / 1024


def rate(script, unit, *flags, **launch):
    """`unit` per second, the median over runs of the median within a run, and peak memory."""
    rates, memory = [], 0
    for _ in range(REPEATS):
        log, peak = run(script, *flags, **launch)
        log = log[len(log) // 5 :]
        steps = [(b[unit] - a[unit]) / (b["seconds"] - a["seconds"]) for a, b in zip(log, log[1:])]
        rates.append(statistics.median(steps))
        memory = max(memory, peak)
    return statistics.median(rates), memory


def matrix_rate(m, k, n):
    """float32 matrix products (m, k) @ (k, n), all cores: GFLOP/s, median of many."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    times = []
    while sum(times) < 0.5:
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2e-9 * m * k * n / statistics.median(times)


def flops_per_position(model):
    """Multiplications and additions of a forward pass in the matrices, for one position."""
    return 2 * sum(p.numel() for p in model.parameters() if p.ndim == 2) - 2 * sum(
        embedding.weight.numel() for embedding in (model.token_embedding, model.position_embedding)
    )


def operator_shares(model, rng, sums, steps=20, shown=10):
    """Share of the time of SFT's forward and backward passes by operator of torch, in %."""
    batches = [collate(random_equations(rng, 256, sums)) for _ in range(steps)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for batch in batches:
            completion_logps(model, *batch).mean().backward()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    longest = sorted(times, key=times.get, reverse=True)[:shown]
    shares = {name: 100 * times[name] / sum(times.values()) for name in longest}
    return shares | {"all others": 100 - sum(shares.values())}


def positions_of(texts):
    """Mean positions a text takes in training: its characters; the last predicts the end."""
    return statistics.mean(map(len, texts))


def measure():
    rng, sums = np.random.default_rng(0), np.array(seen_sums())
    results = {
        "cores": CORES,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": REPEATS,
    }
    torch.set_num_threads(CORES)

    # ---- the machine
    model = GPT(GPTConfig())
    width, rows = model.config.width, 800
    results["matrix products (GFLOP/s)"] = {
        "2048 x 2048 x 2048": matrix_rate(2048, 2048, 2048),
        **{
            f"{rows} x {k} x {n}": matrix_rate(rows, k, n)
            for k, n in ((width, width), (width, 3 * width), (width, 4 * width), (4 * width, width))
        },
    }
    peak = results["matrix products (GFLOP/s)"]["2048 x 2048 x 2048"]

    # ---- SFT
    equation = positions_of([p + c for p, c in random_equations(rng, 10_000, sums)])
    equations, memory = rate("train_sft.py", "equations", "--steps", STEPS)
    results["SFT"] = {
        "equations/s": equations,
        "tokens/s": equations * equation,
        "peak memory (MiB)": memory,
        "share of matrix rate": 3e-9 * flops_per_position(model) * equation * equations / peak,
    }

    results["SFT forward and backward, time by operator (%)"] = operator_shares(model, rng, sums)

    # ---- DPO, on a model of 4 blocks of width 64 and on the default one
    pair = (
        positions_of([p + text for p, *both in random_pairs(rng, 10_000, sums, 3) for text in both])
        * 2
    )
    results["DPO, batch 128"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("4 x 64", ["--depth", 4, "--width", 64]), ("default", [])):
            sft = Path(folder) / "sft.pt"
            # A model so briefly trained gives next to no preferred answer: all prompts give pairs.
            subprocess.run(
                [
                    sys.executable,
                    ROOT / "train_sft.py",
                    "--steps",
                    str(STEPS),
                    *map(str, shape),
                    "--out",
                    sft,
                ],
                check=True,
                capture_output=True,
            )
            shaped = GPT(GPTConfig(4, 64)) if shape else model
            for pairs in ("offline", "online"):
                pairs_rate, memory = rate(
                    "train_dpo.py",
                    "pairs",
                    "--sft",
                    sft,
                    "--pairs",
                    pairs,
                    "--steps",
                    STEPS,
                    "--batch-size",
                    128,
                )
                results["DPO, batch 128"][f"{name}, {pairs}"] = {
                    "pairs/s": pairs_rate,
                    "peak memory (MiB)": memory,
                }
                if pairs == "offline":  # three passes of the policy and one of the reference
                    results["DPO, batch 128"][f"{name}, {pairs}"]["share of matrix rate"] = (
                        4e-9 * flops_per_position(shaped) * pair * pairs_rate / peak
                    )

        # ---- generation, by the default model of the last round above
        model.load_state_dict(torch.load(sft, weights_only=True)["model"])
    times, prompts = [], [f"{n}=" for n in range(5, 101)] * 100
    for _ in range(REPEATS):
        started = time.perf_counter()
        _, completion_mask = generate(model, prompts)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    results["generation"] = {
        "answers": len(prompts),
        "seconds": seconds,
        "tokens/s": completion_mask.sum().item() / seconds,
    }

    # ---- scaling and cost: SFT equations/s
    results["SFT equations/s, by batch size, processes x threads of each"] = {
        f"{batch}, {processes} x {threads}": rate(
            "train_sft.py",
            "equations",
            "--steps",
            STEPS,
            "--batch-size",
            batch,
            processes=processes,
            threads=threads,
        )[0]
        for batch in (64, 128, 256)
        for processes, threads in ((1, 1), (1, CORES), (2, max(1, CORES // 2)))
    }
    results["SFT equations/s, by --max-sum"] = {
        max_sum: rate("train_sft.py", "equations", "--steps", STEPS, "--max-sum", max_sum)[0]
        for max_sum in (100, 999)
    }
    results["SFT equations/s, by --depth"] = {
        depth: rate("train_sft.py", "equations", "--steps", STEPS, "--depth", depth)[0]
        for depth in (4, 6, 8)
    }
    return results


def print_table(results, indent=""):
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            print_table(value, indent + "    ")
        else:
            shown = (
                value
                if not isinstance(value, float)
                else f"{value:,.2f}"
                if value < 100
                else f"{value:,.0f}"
            )
            print(f"{indent}{name:<{44 - len(indent)}}{shown:>14}")


def draw(results, path):
    """Equations/s over processes and batch sizes, --max-sum and --depth."""
    titles = [name for name in results if name.startswith("SFT equations/s, by")]
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(1, 3, figsize=(11, 4), width_ratios=(9, 2.5, 3.5))
        for axes, title in zip(row, titles):
            names = [str(name) for name in results[title]]
            bars = axes.barh(names, results[title].values(), color="#0072B2")
            axes.bar_label(bars, fmt="{:,.0f}", fontsize=9, padding=2)
            axes.set_xlim(0, 1.25 * max(results[title].values()))
            axes.invert_yaxis()
            axes.set_title(title.removeprefix("SFT equations/s, "))
            axes.set_xlabel("equations/s (SFT)")
        with replacing(path, "wb") as file:
            figure.savefig(file, format="png")


if __name__ == "__main__":
    results = measure()
    print_table(results)
    with replacing(ROOT / "plots" / "benchmark.json") as file:
        json.dump(results, file, indent=1)
        file.write("\n")
    draw(results, ROOT / "plots" / "benchmark.png")
