"""The figures of the study. Nothing here measures: all numbers come from the JSON of its parts."""

from pathlib import Path
from statistics import mean, stdev

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from plots.figures import COLOURS, STYLE, draw_histogram, most_terms, save

FOLDER = Path(__file__).parent
REMEDIES = {"without the last term and the end": "#332288", "half wrong sums": "#DDCC77"}
OF_METHODS = {  # one name, one colour, in these figures too
    **COLOURS,
    **REMEDIES,
    "mistakes + NLL": "#66C2A5",
    "imitation": "#000000",
    "online": "#56B4E9",
    "reference": "#8C564B",
    "reference + NLL": "#C49C94",
    "offline, IPO": "#882255",
    "offline, smoothed": "#999933",
    "RLHF": "#CC79A7",
}
MARKERS = ["o", "s", "^", "v", "D", "P"]


def spread(values):
    return stdev(values) if len(values) > 1 else 0.0


def draw_methods(axes, published):
    """The frontier, and a mark for each method: the mean of its runs, with standard deviations.

    Two of the interventions mend the classic pairs, so they stand beside the methods.
    """
    shares, kls = np.array(published["methods"]["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    marks = {name: method["runs"] for name, method in methods_of(published).items()}
    if "interventions" in published:
        of_variants, _ = published["interventions"].values()
        marks |= {name: of_variants[name] for name in REMEDIES}
    for i, (name, runs) in enumerate(marks.items()):
        kl = [run["kl"] for run in runs]
        preferred = [100 * run["sampled"]["preferred"] for run in runs]
        style = {"color": OF_METHODS[name], "marker": MARKERS[i % len(MARKERS)], "capsize": 2}
        deviations = {"xerr": spread(kl), "yerr": spread(preferred)}
        axes.errorbar(
            mean(kl), mean(preferred), **deviations, **style, label=name, linestyle="none"
        )


def methods_of(published):
    """The methods of part 1, and RLHF if it has been run."""
    rlhf = {"RLHF": published["rlhf"]} if "rlhf" in published else {}
    return published["methods"]["methods"] | rlhf


def draw_frontier(published):
    """Share of preferred answers against KL: the least that any policy pays, and the methods.

    The right panel enlarges the upper end of the frontier. A thin line is the path of a run.
    """
    figure = Figure(figsize=(10, 5.2))
    axes, close_up = figure.subplots(1, 2)
    draw_methods(axes, published)
    draw_methods(close_up, published)
    with_path = ("offline", "offline + NLL", "mistakes", "RLHF")
    for name, method in methods_of(published).items():
        looks = method["runs"][0]["looks"] if name in with_path else []
        kl, preferred = [r["kl"] for r in looks], [100 * r["preferred"] for r in looks]
        axes.plot(kl, preferred, color=OF_METHODS[name], linewidth=0.9)
    for n, share, kl in published["methods"]["frontier"]["best of n"]:
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
    close_up.set_ylim(95.5, 100)
    close_up.set_xlabel("KL from SFT (nats)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_rewards(runs, beta):
    """Mean rewards of the two sides of offline pairs, on one scale, with the chosen's ceiling."""
    figure = Figure(figsize=(8, 2.8))
    axes = figure.subplots()
    for side, marker in (("chosen", "o"), ("rejected", "x")):
        style = {"marker": marker, "linestyle": "none"}
        axes.plot([], [], color="black", label=f"{side} side", **style)  # for the legend
        for i, (name, of_method) in enumerate(runs.items()):
            rewards = [beta * run["offline pairs"][side] for run in of_method]
            axes.plot(rewards, [i] * len(rewards), color=OF_METHODS[name], **style)
    ceiling = beta * mean(run["offline pairs"]["ceiling"] for run in next(iter(runs.values())))
    axes.axvline(0, color="#888888", linewidth=1)
    axes.axvline(ceiling, color="black", linestyle="--", label="ceiling of the chosen side")
    axes.set_xlabel("mean reward (β × nats)")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(len(runs) - 0.5, -0.5)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def draw_same_pairs(published):
    """The answers of one SFT model, and after DPO and RLHF on the same offline pairs."""
    panels = [  # title, name of the colour, runs
        ("SFT", "SFT", published["methods"]["sft"]),
        ("DPO, offline pairs", "offline", published["methods"]["methods"]["offline"]["runs"]),
        ("RLHF, the same pairs", "RLHF", published["rlhf"]["runs"]),
        ("RLHF without the KL", "RLHF", published["rlhf"]["without kl"]),
    ]
    most = most_terms(runs[0]["sampled"] for _, _, runs in panels)
    figure = Figure(figsize=(12.5, 3.6))
    for axes, (title, name, runs) in zip(figure.subplots(1, 4, sharey=True), panels):
        draw_histogram(axes, runs[0]["sampled"], title, OF_METHODS[name], 3, most)
    figure.axes[0].set_ylabel(f"share of {runs[0]['sampled']['n']:,} answers (%)")
    figure.axes[0].legend(loc="upper right")
    return figure


JUDGED = {  # (answers, loss): label, colour and marker
    ("online", "sigmoid"): ("online DPO", OF_METHODS["online"], "o"),
    ("reference", "sigmoid"): ("reference DPO", OF_METHODS["reference"], "s"),
    ("mixed", "sigmoid"): ("mixed DPO", OF_METHODS["mistakes"], "D"),
    ("online", "rloo"): ("RLOO", OF_METHODS["RLHF"], "^"),
}


def draw_judge(entries):
    """The share of preferred answers at which runs with a noisy judge end, over beta.

    The marks of one beta stand side by side.
    """
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    predicted = {}
    for i, (kind, (label, color, marker)) in enumerate(JUDGED.items()):
        of_kind = [e for e in entries if (e["settings"]["answers"], e["settings"]["loss"]) == kind]
        betas = [entry["settings"]["beta"] for entry in of_kind]
        shares = [[100 * run["preferred"] for run in entry["runs"]] for entry in of_kind]
        style = {"color": color, "marker": marker, "linestyle": "none", "capsize": 3}
        if of_kind:
            means, deviations = list(map(mean, shares)), list(map(spread, shares))
            beside = [beta * 1.03 ** (i - 1.5) for beta in betas]
            axes.errorbar(beside, means, deviations, label=label, **style)
        for beta, entry in zip(betas, of_kind):
            predicted[beta] = 100 * mean(r["predicted"]["preferred"] for r in entry["runs"])
    betas = sorted(predicted)
    optimum = [predicted[beta] for beta in betas]
    axes.plot(betas, optimum, color="black", zorder=1, label="exact optimum")
    (winners,) = (e for e in entries if e["settings"]["loss"] == "imitation")
    share = 100 * mean(run["preferred"] for run in winners["runs"])
    axes.axhline(share, color="#888888", linestyle="--", label="imitation of the winners")
    axes.set_xscale("log")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("β (logarithmic)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend()
    return figure


def draw_study(published, runs, beta):
    """{name: figure} of the parts that have been run; `runs` are those whose rewards are drawn."""
    with matplotlib.style.context(["default", STYLE]):
        drawn = {"frontier": draw_frontier(published), "rewards": draw_rewards(runs, beta)}
        if "rlhf" in published:
            drawn["rlhf"] = draw_same_pairs(published)
        if "judge" in published:
            drawn["judge"] = draw_judge(published["judge"]["study"])
    return drawn


def save_study(figures):
    with matplotlib.style.context(["default", STYLE]):
        for name, figure in figures.items():
            save(figure, FOLDER, name)
