"""The figures of one evaluation, for evaluate.py. Nothing here measures: it draws results and logs.

A model is named by its label, such as "offline + KL". A log is the list of records that a
checkpoint carries. Those of plots/study/ have a file of their own there.
"""

import io
import os
import tempfile
import textwrap
from pathlib import Path

import matplotlib.style
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from data import write_file

FILES = ("dist.png", "dist.gif", "mass.png", "sft_gap.png")

# One name, one colour (Okabe and Ito's, safe for colour-blind readers) in every figure.
COLOURS = {"SFT": "#0072B2", "offline": "#D55E00", "offline + KL": "#E69F00", "mistakes": "#009E73"}
OTHER_COLOURS = ["#CC79A7", "#56B4E9", "#8C564B", "#000000"]

STYLE = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "text.parse_math": False,  # a label may hold a dollar sign
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def colour(label, labels):
    others = [other for other in labels if other not in COLOURS]
    return COLOURS[label] if label in COLOURS else OTHER_COLOURS[others.index(label) % 4]


def save(figure, folder, name):
    """Writes a figure and returns its path."""
    buffer, path = io.BytesIO(), os.path.join(folder, f"{name}.png")
    figure.savefig(buffer, format="png")
    write_file(path, buffer.getvalue())
    return path


# ---- histograms ------------------------------------------------------------------------------


def most_terms(measured):
    """The largest number of terms in any of the answers, and at least five."""
    return max([5, *(int(k) for metrics in measured for k in metrics["counts"])])


def draw_histogram(axes, metrics, title, color, preferred_terms, most):
    """Shares of answers by term count: exact sums in full colour, wrong ones pale, others grey."""
    counts = range(1, most + 1)
    shares = [100 * metrics["counts"].get(str(k), 0) for k in counts]
    exact = [100 * metrics["exact_counts"].get(str(k), 0) for k in counts]
    unparsed = 100 * (1 - metrics["parse_rate"])
    axes.bar(counts, shares, color=color, alpha=0.35, label="wrong sum")
    axes.bar(counts, exact, color=color, label="exact")
    axes.bar([0], [unparsed], color="#888888")
    for x, share in enumerate([unparsed, *shares]):
        if share >= 0.05:
            axes.annotate(f"{share:.1f}", (x, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(most + 1), ["none", *counts])
    axes.get_xticklabels()[preferred_terms].set_fontweight("bold")
    axes.set_ylim(0, 108)
    axes.grid(axis="x", visible=False)
    axes.set_title(f"{textwrap.fill(title, 26)}\nexact {metrics['exact']:.3f}")
    axes.set_xlabel("terms in the answer")


def draw_histograms(results):
    """The answers of each model by number of terms, side by side on the same axes."""
    sampled = {label: result["sampled"] for label, result in results["models"].items()}
    preferred_terms, most = results["task"]["preferred_terms"], most_terms(sampled.values())
    figure = Figure(figsize=(1 + 3.1 * len(sampled), 4))
    row = figure.subplots(1, len(sampled), sharey=True, squeeze=False)[0]
    for axes, (label, metrics) in zip(row, sampled.items()):
        draw_histogram(axes, metrics, label, colour(label, sampled), preferred_terms, most)
    row[0].set_ylabel(f"share of {metrics['n']:,} sampled answers (%)")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def save_animation(logs, preferred_terms, folder):
    """The histograms of the policy's own answers over the steps, as a GIF; returns its path."""
    looks = {label: looks_of(log) for label, log in logs.items()}
    most = most_terms(record["own"] for records in looks.values() for record in records)
    figure = Figure(figsize=(1 + 3.1 * len(logs), 4))
    row = figure.subplots(1, len(logs), sharey=True, squeeze=False)[0]

    def draw(frame):
        for axes, (label, records) in zip(row, looks.items()):
            axes.clear()
            record = records[min(frame, len(records) - 1)]
            title = f"{label}, step {record['step']}"
            draw_histogram(axes, record["own"], title, colour(label, logs), preferred_terms, most)
        row[0].set_ylabel("share of the policy's own answers (%)")

    last = max(map(len, looks.values())) - 1
    draw(last)  # its titles are the longest
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else every frame is laid out anew
    frames = [*range(min(8, last)), *range(8, last, 3), *[last] * 3]  # and a pause at the end
    path = os.path.join(folder, "dist.gif")
    with tempfile.TemporaryDirectory() as temporary:  # matplotlib writes to a file only
        drawn = Path(temporary, "dist.gif")
        FuncAnimation(figure, draw, frames).save(drawn, PillowWriter(fps=3), dpi=70)
        write_file(path, drawn.read_bytes())
    return path


# ---- curves ----------------------------------------------------------------------------------


def draw_sft(log):
    """The gap to the entropy floor and the share of exact answers, over the equations seen."""
    equations = [record["equations"] / 1000 for record in log]
    color = COLOURS["SFT"]
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    axes.plot(equations, [record["gap"] for record in log], color=color)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("gap to the entropy floor\n(nats per equation)", color=color)
    axes.set_xlabel("equations seen in SFT (thousands)")
    right = axes.twinx()
    right.plot(equations, [100 * r["exact"] for r in log], color="black", linestyle="--")
    right.set_ylabel("exact sampled answers\n(%, dashed)")
    right.set_ylim(0, 105)
    right.grid(False)
    right.spines["right"].set_visible(True)
    return figure


def looks_of(log):
    """The records that measure the policy's own answers."""
    return [record for record in log if "own" in record]


def step_axis(axes, last):
    """Logarithmic from step 1 on, so that the first hundred steps can be seen."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    ticks = [0, *(10**i for i in range(6) if 10**i < 0.7 * last), last]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, last)
    axes.set_xlabel("step (logarithmic)")


def smooth(values, most=9):
    """Running mean over up to `most` values around each, but none over the first eight steps."""
    widths = [min(most // 2, i // 8) for i in range(len(values))]
    windows = [values[max(0, i - width) : i + width + 1] for i, width in enumerate(widths)]
    return [sum(window) / len(window) for window in windows]


MASS_COLOURS = ["#332288", "#88CCEE", "#DDCC77", "#CC6677", "#888888"]  # Tol's muted ones


def mass(own, preferred_terms):
    """The kinds of the policy's own answers, and their shares: together all of them."""
    form = own["counts"].get(str(preferred_terms), 0)
    other_exact = own["exact"] - own["preferred"]
    return {
        f"{preferred_terms} terms, exact": own["preferred"],
        f"{preferred_terms} terms, wrong": form - own["preferred"],
        "other count, exact": other_exact,
        "other count, wrong": own["parse_rate"] - form - other_exact,
        "no equation": 1 - own["parse_rate"],
    }


def draw_mass(logs, preferred_terms):
    """Where the probability goes: pair accuracy above, what the policy really answers below.

    The pair accuracy is the share of pairs whose chosen side has the larger reward; a tie is half.
    """
    figure = Figure(figsize=(max(7, 1 + 3.3 * len(logs)), 5.4))
    grid = figure.subplots(
        2, len(logs), height_ratios=(1, 1.8), sharex="col", sharey="row", squeeze=False
    )
    for (top, bottom), (label, log) in zip(grid.T, logs.items()):
        pairs = [record for record in log if "rewards/accuracies" in record]
        accuracy = smooth([100 * record["rewards/accuracies"] for record in pairs])
        top.plot([record["step"] for record in pairs], accuracy, color="black")
        top.set_ylim(0, 105)
        top.set_title(label)
        looks = looks_of(log)
        kinds = [mass(record["own"], preferred_terms) for record in looks]
        bottom.stackplot(
            [record["step"] for record in looks],
            [[100 * shares[kind] for shares in kinds] for kind in kinds[0]],
            labels=list(kinds[0]),
            colors=MASS_COLOURS,
        )
        bottom.set_ylim(0, 100)
        step_axis(bottom, log[-1]["step"])
    grid[0, 0].set_ylabel("pair accuracy (%)")
    grid[1, 0].set_ylabel(f"share of the policy's\nown {looks[0]['own']['n']} answers (%)")
    handles, labels = grid[1, 0].get_legend_handles_labels()
    columns = 5 if len(logs) > 2 else 3
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=columns)
    return figure


def draw_all(results, logs, folder):
    """Every figure that these results and logs have the material for; returns their paths.

    The first log is that of SFT.
    """
    first_log = next(iter(logs.values()))
    dpo_logs = {label: log for label, log in logs.items() if looks_of(log)}
    with matplotlib.style.context(["default", STYLE]):
        paths = [save(draw_histograms(results), folder, "dist")]
        if any("gap" in record for record in first_log):
            paths.append(save(draw_sft(first_log), folder, "sft_gap"))
        if dpo_logs:
            preferred_terms = results["task"]["preferred_terms"]
            paths.append(save(draw_mass(dpo_logs, preferred_terms), folder, "mass"))
            paths.append(save_animation(dpo_logs, preferred_terms, folder))
    return paths
