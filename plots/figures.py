"""Every figure of the README, drawn from results.json and logs.json alone.

    python evaluate.py                    # measures, then draws
"""

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from data import replacing

# One name, one colour (Okabe and Ito's, safe for colour-blind readers) in every figure.
MODELS = {
    "sft": ("SFT", "#0072B2"),
    "dpo_offline": ("offline DPO", "#D55E00"),
    "dpo": ("online DPO", "#009E73"),
}
OTHER_COLOURS = ["#CC79A7", "#E69F00", "#56B4E9", "#000000"]

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


def label_and_colour(name, names):
    if name in MODELS:
        return MODELS[name]
    others = [other for other in names if other not in MODELS]
    return name, OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]


def save(figure, folder, name):
    with replacing(os.path.join(folder, f"{name}.png"), "wb") as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def draw_histogram(axes, metrics, label, colour, preferred_terms, most_terms):
    """Shares of answers by term count: right sums in full colour, wrong ones pale, the rest grey."""
    ks = [k for k in range(1, most_terms + 1)]
    shares = [100 * metrics["counts"].get(str(k), 0) for k in ks]
    right = [100 * metrics["exact_counts"].get(str(k), 0) for k in ks]
    axes.bar(ks, shares, color=colour, alpha=0.35, label="wrong sum")
    axes.bar(ks, right, color=colour, label="right sum")
    axes.bar([0], [100 * (1 - metrics["parse_rate"])], color="#888888")
    for k, share in zip(ks, shares):
        if share >= 0.05:
            axes.annotate(f"{share:.1f}", (k, share), ha="center", va="bottom", fontsize=9)
    axes.set_xticks([0, *ks], ["none", *ks])
    axes.get_xticklabels()[preferred_terms].set_fontweight("bold")
    axes.set_ylim(0, 108)
    axes.grid(axis="x", visible=False)
    mae = "no answer parses" if metrics["mae"] is None else f"mean abs. error {metrics['mae']:.3f}"
    axes.set_title(f"{label}\n{mae}, parse rate {metrics['parse_rate']:.3f}")
    axes.set_xlabel("terms in the answer")


def draw_histograms(results, folder):
    """One file a model, all on the same axes, and dist.png with them side by side."""
    models, preferred_terms = results["models"], results["task"]["preferred_terms"]
    sampled = {name: result["sampled"]["all"] for name, result in models.items()}
    most_terms = max(5, *(int(k) for metrics in sampled.values() for k in metrics["counts"]))
    for names, file in [([name], f"{name}_dist") for name in models] + [(list(models), "dist")]:
        width = 5.2 if len(names) == 1 else 3.6 * len(names)
        figure, row = plt.subplots(1, len(names), figsize=(width, 3.8), sharey=True, squeeze=False)
        for axes, name in zip(row[0], names):
            label, colour = label_and_colour(name, models)
            draw_histogram(axes, sampled[name], label, colour, preferred_terms, most_terms)
        row[0, 0].set_ylabel(f"share of {sampled[names[0]]['n']:,} sampled answers (%)")
        row[0, 0].legend(loc="upper right")
        save(figure, folder, file)


def draw_sft_loss(log, folder):
    """Training loss and its gap to the entropy floor, over the equations seen."""
    equations = [record["equations"] / 1000 for record in log]
    label, colour = MODELS["sft"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.plot(equations, [record["loss"] for record in log], color=colour, label="training loss")
    left.axhline(log[-1]["floor"], color="black", linestyle="--", label="entropy floor")
    left.set_ylabel("loss (nats per equation)")
    left.legend()
    right.plot(equations, [record["gap"] for record in log], color=colour)
    right.set_yscale("log")
    right.set_ylabel("validation gap to the floor (nats)")
    for axes in (left, right):
        axes.set_xlabel("equations seen (thousands)")
    save(figure, folder, "sft_loss")


CURVES = {  # key in the log: axis label
    "rewards/accuracies": "pair accuracy (new pairs)",
    "rewards/margins": "reward margin (nats)",
    "loss": "loss (nats per pair)",
    "own/preferred": "own samples: preferred form",
    "own/exact": "own samples: exact sums",
    "own/kl": "own samples: KL from SFT (nats)",
}


def draw_dpo_curves(logs, names, folder):
    """What DPO tooling shows (above) and what the policy itself answers (below), over the steps."""
    figure, grid = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True)
    for axes, (key, text) in zip(grid.flat, CURVES.items()):
        for name, log in logs.items():
            label, colour = label_and_colour(name, names)
            points = [(record["step"], record[key]) for record in log if key in record]
            axes.plot(*zip(*points), color=colour, label=label)
        axes.set_title(text)
        if key in ("rewards/accuracies", "own/preferred", "own/exact"):
            axes.set_ylim(0, 1.05)
    for axes in grid[1]:
        axes.set_xlabel("step")
    grid[0, 0].legend(loc="lower right")
    save(figure, folder, "dpo_curves")


def draw_all(results, logs, folder):
    names = list(results["models"])
    dpo_logs = {name: log for name, log in logs.items() if log and "rewards/margins" in log[0]}
    with plt.rc_context(STYLE):
        draw_histograms(results, folder)
        if logs.get("sft"):
            draw_sft_loss(logs["sft"], folder)
        if dpo_logs:
            draw_dpo_curves(dpo_logs, names, folder)
