"""Every figure of the README, drawn from JSON alone: results.json, logs.json and published.json.

python evaluate.py             # measures, then draws
python evaluate.py --replot    # draws again
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from data import replacing

# One name, one colour (Okabe and Ito's, safe for colour-blind readers) in every figure.
MODELS = {
    "sft": ("SFT", "#0072B2"),
    "dpo_offline": ("offline DPO", "#D55E00"),
    "dpo_offline_nll": ("offline DPO + NLL", "#E69F00"),
    "dpo": ("online DPO", "#009E73"),
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


def label_and_colour(name, names):
    if name in MODELS:
        return MODELS[name]
    others = [other for other in in_order(names) if other not in MODELS]
    return name, OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]


def save(figure, folder, name):
    with replacing(os.path.join(folder, f"{name}.png")) as (file,):
        figure.savefig(file, format="png")
    plt.close(figure)


def draw_histogram(axes, metrics, label, colour, preferred_terms, most_terms):
    """Shares of answers by term count: right sums in full colour, wrong ones pale, others grey."""
    counts = range(1, most_terms + 1)
    shares = [100 * metrics["counts"].get(str(k), 0) for k in counts]
    right = [100 * metrics["exact_counts"].get(str(k), 0) for k in counts]
    unparsed = 100 * (1 - metrics["parse_rate"])
    axes.bar(counts, shares, color=colour, alpha=0.35, label="wrong sum")
    axes.bar(counts, right, color=colour, label="right sum")
    axes.bar([0], [unparsed], color="#888888")
    for x, share in zip(range(most_terms + 1), [unparsed, *shares]):
        if share >= 0.05:
            axes.annotate(f"{share:.1f}", (x, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(range(most_terms + 1), ["none", *counts])
    axes.get_xticklabels()[preferred_terms].set_fontweight("bold")
    axes.set_ylim(0, 108)
    axes.grid(axis="x", visible=False)
    mae = "no answer parses" if metrics["mae"] is None else f"mean abs. error {metrics['mae']:.2f}"
    axes.set_title(f"{label}\nexact {metrics['exact']:.3f}, {mae}")
    axes.set_xlabel("terms in the answer")


def draw_histograms(results, folder):
    """The answers of each model by number of terms, side by side on the same axes."""
    names = [name for name in MODELS if name in results["models"]] or in_order(results["models"])
    sampled = {name: results["models"][name]["sampled"]["all"] for name in names}
    most_terms = min(
        9, max(5, *(int(k) for metrics in sampled.values() for k in metrics["counts"]))
    )
    figure, row = plt.subplots(
        1, len(names), figsize=(1 + 3.1 * len(names), 3.8), sharey=True, squeeze=False
    )
    for axes, name in zip(row[0], names):
        label, colour = label_and_colour(name, names)
        draw_histogram(
            axes, sampled[name], label, colour, results["task"]["preferred_terms"], most_terms
        )
    row[0, 0].set_ylabel(f"share of {sampled[names[0]]['n']:,} sampled answers (%)")
    row[0, 0].legend(loc="upper right")
    save(figure, folder, "dist")


def draw_sft(log, folder):
    """The gap to the entropy floor and the share of right answers, over the equations seen."""
    equations = [record["equations"] / 1000 for record in log]
    label, colour = MODELS["sft"]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(equations, [record["gap"] for record in log], color=colour)
    axes.set_yscale("log")
    axes.set_ylabel("gap to the entropy floor\n(nats per equation)", color=colour)
    axes.set_xlabel("equations seen in SFT (thousands)")
    right = axes.twinx()
    right.plot(equations, [100 * r["exact"] for r in log], color="black", linestyle="--")
    right.set_ylabel("exact sampled answers\n(%, dashed)")
    right.set_ylim(0, 105)
    right.grid(False)
    right.spines["right"].set_visible(True)
    save(figure, folder, "sft_gap")


CURVES = {  # key in the log: axis label
    "rewards/accuracies": "pair accuracy (new pairs)",
    "rewards/margins": "reward margin (β × nats)",
    "loss": "loss (nats per pair)",
    "own/preferred": "own answers: preferred",
    "own/exact": "own answers: exact",
    "own/kl": "own answers: KL from SFT (nats)",
}


def draw_curves(logs, folder):
    """What DPO tooling shows (above) and what the policy itself answers (below), over the steps."""
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True)
    for axes, (key, text) in zip(grid.flat, CURVES.items()):
        for name, log in logs.items():
            label, colour = label_and_colour(name, logs)
            records = [record for record in log if key in record]
            values = [record[key] for record in records]
            steps = [record["step"] for record in records]
            axes.plot(steps, values if "own" in key else smooth(values), color=colour, label=label)
        axes.set_title(text)
        if key in ("rewards/accuracies", "own/preferred", "own/exact"):
            axes.set_ylim(0, 1.05)
    for axes in grid[1]:
        axes.set_xlabel("step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(logs))
    save(figure, folder, "dpo_curves")


def smooth(values, window=9):
    """Running mean over the `window` values around each; fewer at the ends."""
    half = window // 2
    return [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


# Kind of answer: its share of the policy's own answers, from a log record, and a colour (Tol's
# muted ones, which no model has).
MASS = {
    "{} terms, right": (lambda own: own["own/preferred"], "#332288"),
    "{} terms, wrong": (lambda own: own["own/form"] - own["own/preferred"], "#88CCEE"),
    "other count, right": (lambda own: own["own/exact"] - own["own/preferred"], "#DDCC77"),
    "other count, wrong": (
        lambda own: own["own/parsed"] - own["own/exact"] - own["own/form"] + own["own/preferred"],
        "#CC6677",
    ),
    "no equation": (lambda own: 1 - own["own/parsed"], "#888888"),
}


def draw_mass(logs, preferred_terms, folder):
    """Where the probability goes: pair accuracy above, what the policy really answers below."""
    figure, grid = plt.subplots(
        2,
        len(logs),
        figsize=(1 + 3.3 * len(logs), 5.4),
        height_ratios=(1, 1.8),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for (top, bottom), (name, log) in zip(grid.T, logs.items()):
        pairs = [record for record in log if "rewards/accuracies" in record]
        accuracy = smooth([100 * record["rewards/accuracies"] for record in pairs])
        top.plot([record["step"] for record in pairs], accuracy, color="black")
        top.set_ylim(0, 105)
        top.set_title(label_and_colour(name, logs)[0])
        own = [record for record in log if "own/kl" in record]
        bottom.stackplot(
            [record["step"] for record in own],
            [[100 * share(record) for record in own] for share, _ in MASS.values()],
            labels=[kind.format(preferred_terms) for kind in MASS],
            colors=[colour for _, colour in MASS.values()],
        )
        bottom.set_ylim(0, 100)
        bottom.margins(x=0)
        bottom.set_xlabel("step")
    grid[0, 0].set_ylabel("pair accuracy (%)")
    grid[1, 0].set_ylabel("share of the policy's\nown 480 answers (%)")
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, fontsize=10)
    save(figure, folder, "mass")


TOKEN_COLOURS = ["#332288", "#88CCEE", "#CC6677", "#DDCC77"]


def draw_tokens(models, folder):
    """Which token pays: a stacked bar a model for rejected answers, and a few token by token.

    `models` maps names to what `who_pays` of evaluate.py returns.
    """
    shown = [name for name in ("dpo_offline", "dpo") if name in models]
    figure, axes = plt.subplot_mosaic(
        [["bars"] * len(shown), shown], figsize=(9.5, 6.4), height_ratios=(1, 2)
    )
    labels = [label_and_colour(name, models)[0] for name in models]
    left = np.zeros(len(models))
    for kind, colour in zip(models[shown[0]]["rejected"], TOKEN_COLOURS):
        nats = np.array([tokens["rejected"][kind] for tokens in models.values()])
        axes["bars"].barh(labels, nats, left=left, color=colour, label=kind)
        left += nats
    axes["bars"].invert_yaxis()
    axes["bars"].grid(axis="y", visible=False)
    axes["bars"].set_xlabel("log π − log π_ref of rejected answers (nats, mean of 2,000)")
    axes["bars"].legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    limit = max(abs(x) for name in shown for s in models[name]["strings"] for x in s["nats"])
    for name in shown:
        strings = sorted(models[name]["strings"], key=lambda string: string["prompt"])
        image = draw_heat_map(axes[name], strings, limit)
        axes[name].set_title(label_and_colour(name, models)[0])
        axes[name].tick_params(labelleft=name == shown[0])
    figure.colorbar(image, ax=[axes[name] for name in shown], label="log π − log π_ref (nats)")
    save(figure, folder, "tokens")


def draw_heat_map(axes, strings, limit):
    """Answers as rows of characters, coloured by nats; a number where it is one nat or more."""
    longest = max(len(string["nats"]) for string in strings)
    grid = np.full((len(strings), longest), np.nan)
    for y, string in enumerate(strings):
        grid[y, : len(string["nats"])] = string["nats"]
        for x, (character, nats) in enumerate(zip([*string["text"], "end"], string["nats"])):
            text = f"{character}\n{nats:.0f}" if abs(nats) >= 1 else character
            colour = "white" if abs(nats) > 0.6 * limit else "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    image = axes.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    sides = [f"{string['prompt']} {string['side']}" for string in strings]
    axes.set_yticks(range(len(strings)), sides, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    return image


METHOD_COLOURS = {  # by the source of pairs, as the models have them; the marker tells the loss
    "offline": "#D55E00",
    "online": "#009E73",
    "reference": "#CC79A7",
    "on-policy": "#0072B2",
    "imitation": "#000000",
}
METHOD_MARKERS = {"NLL": "s", "smoothed": "^", "IPO": "v"}


def draw_frontier(published, folder):
    """Share of preferred answers against KL: the least that any policy pays, and the methods."""
    figure, axes = plt.subplots(figsize=(8, 4.6))
    shares, kls = np.array(published["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    for n, share, kl in published["frontier"]["best of n"]:
        axes.plot(kl, 100 * share, marker="x", color="black", linestyle="none")
        offset, side = ((6, -9), "left") if n <= 8 else ((-6, 2), "right")
        style = {"textcoords": "offset points", "fontsize": 8}
        axes.annotate(f"best of {n}", (kl, 100 * share), offset, ha=side, **style)
    for name, method in published["methods"].items():
        points = np.array(method["points"])
        colour = METHOD_COLOURS[name.replace(",", "").split(" ")[0]]
        marker = next((m for word, m in METHOD_MARKERS.items() if word in name), "o")
        filled = {"facecolor": "none"} if marker != "o" else {}
        axes.scatter(
            points[:, 0],
            100 * points[:, 1],
            s=28,
            color=colour,
            marker=marker,
            label=name,
            **filled,
        )
    axes.set_xscale("symlog", linthresh=2)
    axes.set_xticks([0, 0.5, 1, 1.5, 2, 5, 10, 20], ["0", "0.5", "1", "1.5", "2", "5", "10", "20"])
    axes.set_xlim(left=0)
    axes.set_xlabel("KL from SFT (nats, logarithmic from 2 on)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    save(figure, folder, "frontier")


def draw_optimum(published, folder):
    """With a judge that errs: the share of preferred answers that theory predicts, and runs."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    runs = [run for run in published["judge"] if not run["kind"]]
    curve = sorted({run["beta"]: 100 * run["share predicted"][0] for run in runs}.items())
    axes.plot(*zip(*curve), color="black", label="predicted: the optimum of DPO")
    for source, label in (("on-policy", "pairs of the policy"), ("reference", "pairs of SFT")):
        points = sorted((run["beta"], *run["preferred"]) for run in runs if run["source"] == source)
        betas, mean, _, least, greatest = np.array(points).T
        axes.errorbar(
            betas,
            100 * mean,
            100 * np.array((mean - least, greatest - mean)),
            color=METHOD_COLOURS[source],
            marker="o",
            capsize=3,
            label=label,
        )
    for run in published["judge"]:
        if "imitation" in run["kind"]:
            share = 100 * run["preferred"][0]
            axes.axhline(share, color="#888888", linestyle="--", label=run["kind"])
    axes.set_xscale("log")
    axes.set_xticks([beta for beta, _ in curve], [f"{beta:g}" for beta, _ in curve])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("β (logarithmic)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend(fontsize=9)
    save(figure, folder, "optimum")


def draw_published(published, folder):
    """The figures of many runs."""
    with plt.rc_context(STYLE):
        draw_frontier(published, folder)
        draw_optimum(published, folder)


def draw_all(results, logs, folder):
    """Every figure of a run that these results and logs have the material for."""
    dpo_logs = {
        name: log
        for name, log in logs.items()
        if name in MODELS and any("own/kl" in r for r in log)
    }
    tokens = {
        name: result["tokens"]
        for name, result in results["models"].items()
        if name in MODELS and "tokens" in result
    }
    with plt.rc_context(STYLE):
        draw_histograms(results, folder)
        if logs.get("sft"):
            draw_sft(logs["sft"], folder)
        if dpo_logs:
            draw_curves(dpo_logs, folder)
            draw_mass(dpo_logs, results["task"]["preferred_terms"], folder)
        if {"dpo_offline", "dpo"} & set(tokens):
            draw_tokens(tokens, folder)
