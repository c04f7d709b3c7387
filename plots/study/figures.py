"""The figures of the study. Nothing here measures: all numbers come from the JSON of its parts."""

from statistics import mean, stdev

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from plots.figures import COLOURS, STYLE, draw_histogram, most_terms, save
from plots.study.runs import BETA, RATES

OF_METHODS = {  # one name, one colour, in these figures too
    **COLOURS,
    "offline + NLL": "#AA3377",
    "imitation": "#000000",
    "online": "#56B4E9",
    "reference": "#8C564B",
    "reference + KL": "#C49C94",
    "offline, smoothed": "#999933",
    "RLHF": "#CC79A7",
    "RLHF without the KL": "#CC79A7",
}
WITH_PATH = ("offline", "offline + KL")
WITH_REWARDS = ("offline", "offline + KL", "mistakes", "offline + NLL", "imitation")
MARKERS = ["o", "s", "^", "v", "D", "P"]


def rate_text(lr):
    """A learning rate as the pages write it: 0.0003 -> "3e-4"."""
    return f"{lr:.0e}".replace("e-0", "e-")


def spread(values):
    return stdev(values) if len(values) > 1 else 0.0


def draw_methods(axes, study, results):
    """The frontier, and a mark for each method: the mean over seeds, with standard deviations."""
    shares, kls = np.array(study["methods"]["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    for i, name in enumerate((*study["methods"]["methods"], "RLHF")):
        kl = [result["kl"] for result in results[name]]
        preferred = [100 * result["sampled"]["preferred"] for result in results[name]]
        style = {"color": OF_METHODS[name], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        deviations = {"xerr": spread(kl), "yerr": spread(preferred)}
        axes.errorbar(
            mean(kl), mean(preferred), **deviations, **style, label=name, linestyle="none"
        )


def draw_frontier(study, results):
    """Share of preferred answers against KL: the least that any policy pays, and the methods.

    The right panel enlarges the framed part of the left one. A thin line is the path of a run.
    """
    figure = Figure(figsize=(10, 5.2))
    axes, close_up = figure.subplots(1, 2)
    draw_methods(axes, study, results)
    draw_methods(close_up, study, results)
    for name in WITH_PATH:
        looks = results[name][0]["looks"]
        kl, preferred = [r["kl"] for r in looks], [100 * r["preferred"] for r in looks]
        axes.plot(kl, preferred, color=OF_METHODS[name], linewidth=0.9)
    for n, share, kl in study["methods"]["frontier"]["best of n"]:
        axes.plot(kl, 100 * share, marker="x", color="black", linestyle="none")
        offset, side = ((6, -9), "left") if n <= 8 else ((-6, 2), "right")
        style = {"textcoords": "offset points", "ha": side, "fontsize": 8}
        axes.annotate(f"best of {n}", (kl, 100 * share), offset, **style)
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xticks([0, 0.5, 1, 1.5, 2, 5, 10, 20, 40])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, 40)
    axes.set_ylim(0, 104)
    axes.set_xlabel("KL from SFT (nats, logarithmic from 2 on)")
    axes.set_ylabel("preferred answers (%)")
    left, right, bottom, top = 1.25, 2.75, 92.5, 100  # what the right panel enlarges
    close_up.set_xlim(left, right)
    close_up.set_ylim(bottom, top)
    close_up.set_xlabel("KL from SFT (nats)")
    close_up.set_title("the frame of the left panel")
    axes.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, linestyle=":"))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_rates(rows):
    """Preferred and exact answers of every row at every rate, on seed 0; the best is framed."""
    figure = Figure(figsize=(11, 0.8 + 0.33 * len(rows)))
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True), (1, 2), ("preferred", "exact")
    ):
        percent = [[100 * of_rate[column] for of_rate in row["tried"]] for row in rows.values()]
        axes.imshow(percent, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for y, (row, values) in enumerate(zip(rows.values(), percent)):
            for x, value in enumerate(values):
                color = "white" if value < 50 else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=9)
            best = RATES.index(row["settings"]["lr"])
            axes.add_patch(
                Rectangle((best - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", lw=2)
            )
        axes.set_xticks(range(len(RATES)), map(rate_text, RATES), fontsize=9)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.grid(False)
        axes.set_xlabel("learning rate")
        axes.set_title(f"{title} answers (%)")
    return figure


def draw_rewards(results):
    """Mean rewards of the two sides of offline pairs, on one scale, with the chosen's ceiling."""
    figure = Figure(figsize=(8, 2.8))
    axes = figure.subplots()
    for side, marker in (("chosen", "o"), ("rejected", "x")):
        style = {"marker": marker, "linestyle": "none"}
        axes.plot([], [], color="black", label=f"{side} side", **style)  # for the legend
        for i, name in enumerate(WITH_REWARDS):
            rewards = [BETA * result["offline pairs"][side] for result in results[name]]
            axes.plot(rewards, [i] * len(rewards), color=OF_METHODS[name], **style)
    ceiling = BETA * mean(r["offline pairs"]["ceiling"] for r in results["offline"])
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axvline(ceiling, color="black", linestyle="--", label="ceiling of the chosen side")
    axes.set_xlabel("mean reward (β × nats)")
    axes.set_yticks(range(len(WITH_REWARDS)), WITH_REWARDS)
    axes.set_ylim(len(WITH_REWARDS) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def pooled(results):
    """The metrics of the sampled answers of all seeds together."""
    sampled = [result["sampled"] for result in results]
    metrics = {key: mean(s[key] for s in sampled) for key in ("parse_rate", "exact")}
    for key in ("counts", "exact_counts"):
        counts = set().union(*(s[key] for s in sampled))
        metrics[key] = {k: mean(s[key].get(k, 0) for s in sampled) for k in counts}
    return metrics | {"n": sum(s["n"] for s in sampled)}


def draw_same_pairs(results):
    """The answers of the SFT models, and of the policies that the same offline pairs taught."""
    panels = {  # title: name
        "SFT": "SFT",
        "DPO": "offline",
        "DPO + KL": "offline + KL",
        "RLHF": "RLHF",
        "RLHF without the KL": "RLHF without the KL",
    }
    sampled = [pooled(results[name]) for name in panels.values()]
    most = most_terms(sampled)
    figure = Figure(figsize=(17, 3.6))
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, name), metrics in zip(row, panels.items(), sampled):
        draw_histogram(axes, metrics, title, OF_METHODS[name], 3, most)
    row[0].set_ylabel(f"share of {sampled[0]['n']:,} answers (%)")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_study(study, rows, results, folder):
    """Draws all figures before it writes any."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = {
            "frontier": draw_frontier(study, results),
            "rates": draw_rates(rows),
            "rewards": draw_rewards(results),
            "rlhf": draw_same_pairs(results),
        }
        for name, figure in drawn.items():
            save(figure, folder, name)
