"""Every figure: those of one evaluation, for evaluate.py, and of many runs, for plots/tables.py.

Nothing here measures: all numbers come from results, logs and published.json.
"""

import io
import os

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from data import atomic_write

# One name, one colour (Okabe and Ito's, safe for colour-blind readers) in every figure.
MODELS = {
    "sft": ("SFT", "#0072B2"),
    "dpo_offline": ("offline", "#D55E00"),
    "dpo_offline_nll": ("offline + NLL", "#E69F00"),
    "dpo": ("mistakes", "#009E73"),
}
OTHER_COLOURS = ["#CC79A7", "#56B4E9", "#8C564B", "#000000"]

STYLE = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def in_order(names):
    """The models of the README in its order, then all others by name."""
    return [name for name in MODELS if name in names] + sorted(set(names) - set(MODELS))


def label(name):
    return MODELS[name][0] if name in MODELS else name


def colour(name, names):
    others = [other for other in in_order(names) if other not in MODELS]
    return MODELS[name][1] if name in MODELS else OTHER_COLOURS[others.index(name) % 4]


def save(figure, folder, name):
    """Writes a figure and returns its path."""
    buffer, path = io.BytesIO(), os.path.join(folder, f"{name}.png")
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return path


# ---- one evaluation --------------------------------------------------------------------------


def draw_histogram(axes, metrics, name, color, preferred_terms, most_terms):
    """Shares of answers by term count: right sums in full colour, wrong ones pale, others grey."""
    counts = range(1, most_terms + 1)
    shares = [100 * metrics["counts"].get(str(k), 0) for k in counts]
    right = [100 * metrics["exact_counts"].get(str(k), 0) for k in counts]
    unparsed = 100 * (1 - metrics["parse_rate"])
    axes.bar(counts, shares, color=color, alpha=0.35, label="wrong sum")
    axes.bar(counts, right, color=color, label="right sum")
    axes.bar([0], [unparsed], color="#888888")
    for x, share in enumerate([unparsed, *shares]):
        if share >= 0.05:
            axes.annotate(f"{share:.1f}", (x, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(most_terms + 1), ["none", *counts])
    axes.get_xticklabels()[preferred_terms].set_fontweight("bold")
    axes.set_ylim(0, 108)
    axes.grid(axis="x", visible=False)
    mae = "no answer parses" if metrics["mae"] is None else f"mean abs. error {metrics['mae']:.2f}"
    axes.set_title(f"{name}\nexact {metrics['exact']:.3f}, {mae}")
    axes.set_xlabel("terms in the answer")


def draw_histograms(results):
    """The answers of each model by number of terms, side by side on the same axes."""
    sampled = {name: result["sampled"] for name, result in results["models"].items()}
    found = [int(k) for metrics in sampled.values() for k in metrics["counts"]]
    most_terms = min(9, max(5, *found)) if found else 5
    figure = Figure(figsize=(1 + 3.1 * len(sampled), 3.8))
    row = figure.subplots(1, len(sampled), sharey=True, squeeze=False)[0]
    for axes, (name, metrics) in zip(row, sampled.items()):
        terms, color = results["task"]["preferred_terms"], colour(name, sampled)
        draw_histogram(axes, metrics, label(name), color, terms, most_terms)
    row[0].set_ylabel(f"share of {metrics['n']:,} sampled answers (%)")
    row[0].legend(loc="upper right")
    return figure


def draw_sft(log):
    """The gap to the entropy floor and the share of right answers, over the equations seen."""
    equations = [record["equations"] / 1000 for record in log]
    color = MODELS["sft"][1]
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    axes.plot(equations, [record["gap"] for record in log], color=color)
    axes.set_yscale("log")
    axes.set_ylabel("gap to the entropy floor\n(nats per equation)", color=color)
    axes.set_xlabel("equations seen in SFT (thousands)")
    right = axes.twinx()
    right.plot(equations, [100 * r["exact"] for r in log], color="black", linestyle="--")
    right.set_ylabel("exact sampled answers\n(%, dashed)")
    right.set_ylim(0, 105)
    right.grid(False)
    right.spines["right"].set_visible(True)
    return figure


def step_axis(axes, last):
    """Logarithmic from step 1 on, so that the first hundred steps can be seen."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    ticks = [0, *(10**i for i in range(6) if 10**i < 0.7 * last), last]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0, last)
    axes.set_xlabel("step (logarithmic)")


def smooth(values, window=9):
    """Running mean over the `window` values around each; fewer at the ends."""
    half = window // 2
    return [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


CURVES = {  # key in a record of the log: axis label
    "rewards/accuracies": "pair accuracy (new pairs)",
    "rewards/margins": "reward margin (β × nats)",
    "loss": "loss (nats per pair)",
}
OWN_CURVES = {  # key in a look at the policy's own answers
    "preferred": "own answers: preferred",
    "exact": "own answers: exact",
    "kl": "own answers: KL from SFT (nats)",
}


def draw_curves(logs):
    """What DPO tooling shows (above) and what the policy itself answers (below), over the steps."""
    figure = Figure(figsize=(10, 5.6))
    grid = figure.subplots(2, 3, sharex=True)
    for name, log in logs.items():
        style = {"color": colour(name, logs), "label": label(name)}
        for axes, key in zip(grid[0], CURVES):
            records = [record for record in log if key in record]
            values = smooth([record[key] for record in records])
            axes.plot([record["step"] for record in records], values, **style)
        looks = [record for record in log if "own" in record]
        for axes, key in zip(grid[1], OWN_CURVES):
            axes.plot([r["step"] for r in looks], [r["own"][key] for r in looks], **style)
    for axes, title in zip(grid.flat, [*CURVES.values(), *OWN_CURVES.values()]):
        axes.set_title(title)
    for axes in (grid[0, 0], grid[1, 0], grid[1, 1]):
        axes.set_ylim(0, 1.05)
    for axes in grid[1]:
        step_axis(axes, max(log[-1]["step"] for log in logs.values()))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(logs))
    return figure


MASS_COLOURS = ["#332288", "#88CCEE", "#DDCC77", "#CC6677", "#888888"]  # Tol's muted ones


def mass(own, terms):
    """The kinds of the policy's own answers, and their shares: together all of them."""
    form = own["counts"].get(str(terms), 0)
    other_exact = own["exact"] - own["preferred"]
    return {
        f"{terms} terms, right": own["preferred"],
        f"{terms} terms, wrong": form - own["preferred"],
        "other count, right": other_exact,
        "other count, wrong": own["parse_rate"] - form - other_exact,
        "no equation": 1 - own["parse_rate"],
    }


def draw_mass(logs, terms):
    """Where the probability goes: pair accuracy above, what the policy really answers below."""
    figure = Figure(figsize=(max(7, 1 + 3.3 * len(logs)), 5.4))
    grid = figure.subplots(
        2, len(logs), height_ratios=(1, 1.8), sharex="col", sharey="row", squeeze=False
    )
    for (top, bottom), (name, log) in zip(grid.T, logs.items()):
        pairs = [record for record in log if "rewards/accuracies" in record]
        accuracy = smooth([100 * record["rewards/accuracies"] for record in pairs])
        top.plot([record["step"] for record in pairs], accuracy, color="black")
        top.set_ylim(0, 105)
        top.set_title(label(name))
        looks = [record for record in log if "own" in record]
        kinds = [mass(record["own"], terms) for record in looks]
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
    """Every figure that these results and logs have the material for; returns their paths."""
    dpo_logs = {name: log for name, log in logs.items() if any("own" in r for r in log)}
    with matplotlib.style.context(["default", STYLE]):
        paths = [save(draw_histograms(results), folder, "dist")]
        if logs.get("sft"):
            paths.append(save(draw_sft(logs["sft"]), folder, "sft_gap"))
        if dpo_logs:
            paths.append(save(draw_curves(dpo_logs), folder, "dpo_curves"))
            terms = results["task"]["preferred_terms"]
            paths.append(save(draw_mass(dpo_logs, terms), folder, "mass"))
    return paths


# ---- many runs -------------------------------------------------------------------------------

METHOD_COLOURS = {  # by the source of pairs; the marker tells the loss
    "offline": "#D55E00",
    "mistakes": "#009E73",
    "reference": "#CC79A7",
    "online": "#0072B2",
    "imitation": "#000000",
}
METHOD_MARKERS = {"NLL": "s", "smoothed": "^", "IPO": "v"}


def draw_frontier(published):
    """Share of preferred answers against KL: the least that any policy pays, and the methods."""
    figure = Figure(figsize=(8, 4.6))
    axes = figure.subplots()
    shares, kls = np.array(published["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    for n, share, kl in published["frontier"]["best of n"]:
        axes.plot(kl, 100 * share, marker="x", color="black", linestyle="none")
        offset, side = ((6, -9), "left") if n <= 8 else ((-6, 2), "right")
        style = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"best of {n}", (kl, 100 * share), offset, ha=side, **style)
    for name, method in published["methods"].items():
        kl = [run["kl"] for run in method["runs"]]
        preferred = [100 * run["sampled"]["preferred"] for run in method["runs"]]
        color = METHOD_COLOURS[name.replace(",", "").split(" ")[0]]
        marker = next((m for word, m in METHOD_MARKERS.items() if word in name), "o")
        face = "none" if marker != "o" else color
        style = {"edgecolors": color, "facecolors": face, "marker": marker, "s": 28}
        axes.scatter(kl, preferred, label=name, **style)
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xticks([0, 0.5, 1, 1.5, 2, 5, 10, 20], ["0", "0.5", "1", "1.5", "2", "5", "10", "20"])
    axes.set_xlim(left=0)
    axes.set_xlabel("KL from SFT (nats, logarithmic from 2 on)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


NEXT_TOKENS = {"end": "#332288", "plus sign": "#CC6677", "digit": "#DDCC77"}


def draw_next_token(runs):
    """What each model does where a rejected, right answer is complete; a bar a model."""
    figure = Figure(figsize=(7, 2.6))
    axes = figure.subplots()
    left = np.zeros(len(runs))
    for kind, color in NEXT_TOKENS.items():
        means = [
            np.mean([100 * r["next token"][kind] for r in of_model]) for of_model in runs.values()
        ]
        axes.barh([label(name) for name in runs], means, left=left, color=color, label=kind)
        left += means
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("probability of the next token (%)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure


def draw_published(published, runs, folder):
    """The figures of many runs; `runs` maps the models of the README to their results."""
    with matplotlib.style.context(["default", STYLE]):
        save(draw_frontier(published), folder, "frontier")
        save(draw_next_token(runs), folder, "next_token")
