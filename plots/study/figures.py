"""The figures of the study. Nothing here measures: all numbers come from the JSON of its parts."""

from statistics import mean, stdev

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from plots.figures import COLOURS, STYLE, draw_histogram, most_terms, save
from plots.study.runs import BETA

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
WITH_PATH = ("offline", "offline + KL", "mistakes", "RLHF")
WITH_REWARDS = ("offline", "offline + KL", "mistakes", "offline + NLL", "imitation")
MARKERS = ["o", "s", "^", "v", "D", "P"]


def spread(values):
    return stdev(values) if len(values) > 1 else 0.0


def draw_methods(axes, study, runs_of):
    """The frontier, and a mark for each method: the mean of its runs, with standard deviations."""
    shares, kls = np.array(study["methods"]["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    for i, name in enumerate((*study["methods"]["methods"], "RLHF")):
        runs = runs_of[name]
        kl = [run["kl"] for run in runs]
        preferred = [100 * run["sampled"]["preferred"] for run in runs]
        style = {"color": OF_METHODS[name], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        deviations = {"xerr": spread(kl), "yerr": spread(preferred)}
        axes.errorbar(
            mean(kl), mean(preferred), **deviations, **style, label=name, linestyle="none"
        )


def draw_frontier(study, runs_of):
    """Share of preferred answers against KL: the least that any policy pays, and the methods.

    The right panel enlarges the upper end of the frontier. A thin line is the path of a run.
    """
    figure = Figure(figsize=(10, 5.2))
    axes, close_up = figure.subplots(1, 2)
    draw_methods(axes, study, runs_of)
    draw_methods(close_up, study, runs_of)
    for name in WITH_PATH:
        looks = runs_of[name][0]["looks"]
        kl, preferred = [r["kl"] for r in looks], [100 * r["preferred"] for r in looks]
        axes.plot(kl, preferred, color=OF_METHODS[name], linewidth=0.9)
    for n, share, kl in study["methods"]["frontier"]["best of n"]:
        axes.plot(kl, 100 * share, marker="x", color="black", linestyle="none")
        offset, side = ((6, -9), "left") if n <= 8 else ((-6, 2), "right")
        style = {"textcoords": "offset points", "ha": side, "fontsize": 8}
        axes.annotate(f"best of {n}", (kl, 100 * share), offset, **style)
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xticks([0, 0.5, 1, 1.5, 2, 5, 10, 20], ["0", "0.5", "1", "1.5", "2", "5", "10", "20"])
    axes.set_xlim(0, 30)
    axes.set_ylim(0, 104)
    axes.set_xlabel("KL from SFT (nats, logarithmic from 2 on)")
    axes.set_ylabel("preferred answers (%)")
    close_up.set_xlim(1.25, 2.0)
    close_up.set_ylim(92.5, 100)
    close_up.set_xlabel("KL from SFT (nats)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_rewards(runs_of):
    """Mean rewards of the two sides of offline pairs, on one scale, with the chosen's ceiling."""
    figure = Figure(figsize=(8, 2.8))
    axes = figure.subplots()
    for side, marker in (("chosen", "o"), ("rejected", "x")):
        style = {"marker": marker, "linestyle": "none"}
        axes.plot([], [], color="black", label=f"{side} side", **style)  # for the legend
        for i, name in enumerate(WITH_REWARDS):
            rewards = [BETA * run["offline pairs"][side] for run in runs_of[name]]
            axes.plot(rewards, [i] * len(rewards), color=OF_METHODS[name], **style)
    ceiling = BETA * mean(run["offline pairs"]["ceiling"] for run in runs_of["offline"])
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axvline(ceiling, color="black", linestyle="--", label="ceiling of the chosen side")
    axes.set_xlabel("mean reward (β × nats)")
    axes.set_yticks(range(len(WITH_REWARDS)), WITH_REWARDS)
    axes.set_ylim(len(WITH_REWARDS) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def pooled(runs):
    """The metrics of the sampled answers of all runs together."""
    sampled = [run["sampled"] for run in runs]
    metrics = {key: mean(s[key] for s in sampled) for key in ("parse_rate", "mae", "exact")}
    for key in ("counts", "exact_counts"):
        counts = set().union(*(s[key] for s in sampled))
        metrics[key] = {k: mean(s[key].get(k, 0) for s in sampled) for k in counts}
    return metrics | {"n": sum(s["n"] for s in sampled)}


def draw_same_pairs(runs_of):
    """The answers of the SFT models, and of the policies that the same offline pairs taught."""
    panels = {  # title: runs
        "SFT": "SFT",
        "DPO": "offline",
        "DPO + KL": "offline + KL",
        "RLHF": "RLHF",
        "RLHF without the KL": "RLHF without the KL",
    }
    sampled = [pooled(runs_of[name]) for name in panels.values()]
    most = most_terms(sampled)
    figure = Figure(figsize=(14.5, 3.6))
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, name), metrics in zip(row, panels.items(), sampled):
        draw_histogram(axes, metrics, title, OF_METHODS[name], 3, most)
    row[0].set_ylabel(f"share of {sampled[0]['n']:,} answers (%)")
    row[0].legend(loc="upper right")
    return figure


JUDGED = {  # kind: colour and marker
    "online DPO": (OF_METHODS["online"], "o"),
    "reference DPO": (OF_METHODS["reference"], "s"),
    "RL": (OF_METHODS["RLHF"], "^"),
}


def draw_judge(judge):
    """The share of preferred answers at which runs with a noisy judge end, and the optimum.

    The marks of one beta stand side by side, each with a tick at the optimum of its beta.
    """
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    betas, shares = np.array(judge["curve"]).T
    axes.plot(betas, 100 * shares, color="black", label="exact optimum")
    for i, (kind, (color, marker)) in enumerate(JUDGED.items()):
        style = {"color": color, "marker": marker, "linestyle": "none", "capsize": 3, "label": kind}
        for entry in judge["study"].values():
            if entry["settings"]["kind"] == kind:
                beside = entry["settings"]["beta"] * 1.06 ** (i - 1)
                ends = [100 * run["sampled"]["preferred"] for run in entry["runs"]]
                axes.errorbar(beside, mean(ends), spread(ends), **style)
                optimum = 100 * mean(run["optimum"]["preferred"] for run in entry["runs"])
                axes.plot(beside, optimum, color="black", marker="_", markersize=14)
                style["label"] = None  # once in the legend
    axes.set_xscale("log")
    ticks = sorted({entry["settings"]["beta"] for entry in judge["study"].values()})
    axes.set_xticks(ticks, [f"{beta:g}" for beta in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("β (logarithmic)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend()
    return figure


def draw_study(study, runs_of, folder):
    """Draws all figures before it writes any; `runs_of` is {method: its runs}."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = {
            "frontier": draw_frontier(study, runs_of),
            "rewards": draw_rewards(runs_of),
            "rlhf": draw_same_pairs(runs_of),
            "judge": draw_judge(study["judge"]),
        }
        for name, figure in drawn.items():
            save(figure, folder, name)
