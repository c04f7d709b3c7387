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
OTHER_COLOURS = ["#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#000000"]

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
    """Shares of answers by term count: right sums in full colour, wrong ones pale, others grey."""
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
    """One file a model of the README, all on the same axes, and dist.png with them side by side."""
    preferred_terms = results["task"]["preferred_terms"]
    models = [name for name in MODELS if name in results["models"]] or list(results["models"])
    sampled = {name: results["models"][name]["sampled"]["all"] for name in models}
    most_terms = max(5, *(int(k) for metrics in sampled.values() for k in metrics["counts"]))
    for names, file in [([name], f"{name}_dist") for name in models] + [(models, "dist")]:
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
    "rewards/margins": "reward margin (β × nats)",
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
            records = [record for record in log if key in record]
            values = [record[key] for record in records]
            axes.plot(
                [record["step"] for record in records],
                values if "own" in key else smooth(values),
                color=colour,
                label=label,
            )
        axes.set_title(text)
        if key in ("rewards/accuracies", "own/preferred", "own/exact"):
            axes.set_ylim(0, 1.05)
    for axes in grid[1]:
        axes.set_xlabel("step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(logs))
    save(figure, folder, "dpo_curves")


# Kind of answer: its share of the policy's own samples, and a colour (Tol's muted ones, which no
# model has).
MASS = {
    "3 terms, right": (lambda own: own["own/preferred_exact"], "#332288"),
    "3 terms, wrong": (lambda own: own["own/preferred"] - own["own/preferred_exact"], "#88CCEE"),
    "other count, right": (lambda own: own["own/exact"] - own["own/preferred_exact"], "#DDCC77"),
    "other count, wrong": (
        lambda own: (
            own["own/parsed"] - own["own/exact"] - own["own/preferred"] + own["own/preferred_exact"]
        ),
        "#CC6677",
    ),
    "no equation": (lambda own: 1 - own["own/parsed"], "#888888"),
}


def draw_mass(logs, names, task, folder):
    """Where the probability goes: what pairs show above, what the policy really answers below."""
    figure, grid = plt.subplots(
        2,
        len(logs),
        figsize=(4.9 * len(logs), 6),
        height_ratios=(1, 1.7),
        sharex="col",
        sharey="row",
        squeeze=False,
    )
    for (top, bottom), (name, log) in zip(grid.T, logs.items()):
        label, colour = label_and_colour(name, names)
        pairs = [record for record in log if "rewards/margins" in record]
        steps = [record["step"] for record in pairs]
        top.plot(steps, smooth([record["rewards/accuracies"] for record in pairs]), color="black")
        top.set_ylim(0, 1.05)
        top.set_title(label)
        margins = top.twinx()
        margins.plot(
            steps,
            smooth([record["rewards/margins"] for record in pairs]),
            color=colour,
            linestyle="--",
        )
        margins.spines["right"].set_visible(True)
        margins.grid(False)
        margins.set_ylabel("reward margin (dashed)", color=colour)
        own = [record for record in log if "own/kl" in record]
        shares = [[share(record) for record in own] for share, _ in MASS.values()]
        kinds = [kind.replace("3", str(task["preferred_terms"])) for kind in MASS]
        bottom.stackplot(
            [record["step"] for record in own],
            shares,
            labels=kinds,
            colors=[c for _, c in MASS.values()],
        )
        bottom.set_ylim(0, 1)
        bottom.margins(x=0)
        bottom.set_xlabel("step")
    grid[0, 0].set_ylabel("pair accuracy (solid)")
    grid[1, 0].set_ylabel("share of the policy's own answers")
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=5, fontsize=10)
    save(figure, folder, "mass")


def smooth(values, window=9):
    """Running mean over the `window` values around each; fewer at the ends."""
    half = window // 2
    return [
        sum(near) / len(near)
        for near in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]


def draw_tokens(tokens, names, folder):
    """log pi - log pi_ref of every token of a few answers: one panel a model, one row an answer."""
    models = [name for name in MODELS if name in tokens["models"]]
    strings = tokens["strings"]
    longest = max(len(string["text"]) for string in strings) + 1
    limit = max(abs(x) for string in strings for name in models for x in string["nats"][name])
    figure, row = plt.subplots(1, len(models), figsize=(5.2 * len(models), 3.6), squeeze=False)
    for axes, name in zip(row[0], models):
        grid = [
            string["nats"][name] + [float("nan")] * (longest - len(string["nats"][name]))
            for string in strings
        ]
        image = axes.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for y, string in enumerate(strings):
            for x, (character, nats) in enumerate(
                zip([*string["text"], "end"], string["nats"][name])
            ):
                colour = "white" if abs(nats) > 0.6 * limit else "black"
                axes.text(
                    x,
                    y,
                    f"{character}\n{nats:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=colour,
                )
        axes.set_yticks(
            range(len(strings)), [f"{string['side']}  {string['prompt']}" for string in strings]
        )
        axes.tick_params(left=False, labelleft=axes is row[0, 0])
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        axes.grid(False)
        axes.set_title(label_and_colour(name, names)[0])
    figure.colorbar(image, ax=row[0], label="log π − log π_ref (nats)")
    save(figure, folder, "tokens")


def draw_frontier(results, logs, folder):
    """KL from the reference against the preferred share, along online runs of different beta."""
    task, ideal = results["task"], results["oracle"]["kl"]
    runs = sorted(
        (result["beta"], name)
        for name, result in results["models"].items()
        if result.get("pairs") == "online" and logs.get(name)
    )
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for beta, name in runs:
        own = [record for record in logs[name] if "own/kl" in record]
        kls, shares = (
            smooth([record[key] for record in own], window=5) for key in ("own/kl", "own/preferred")
        )
        axes.plot(
            kls,
            [100 * share for share in shares],
            color=label_and_colour(name, list(results["models"]))[1],
            marker=".",
            label=f"β = {beta:g}",
        )
    axes.plot(
        ideal,
        100,
        marker="*",
        markersize=16,
        color="black",
        linestyle="none",
        label="oracle: least KL",
    )
    axes.set_xlabel("KL from the SFT model (nats)")
    axes.set_ylabel(f"own answers with {task['preferred_terms']} terms (%)")
    axes.legend(loc="lower right")
    save(figure, folder, "frontier")


def draw_oracle(results, folder):
    """The first term of preferred answers: what the oracle writes, and what DPO does."""
    bin_width = max(1, results["task"]["max_sum"] // 20)
    curves = [("oracle", "black", results["oracle"]["first_terms"])]
    curves += [
        (*MODELS[name], results["models"][name]["first_terms"])
        for name in MODELS
        if name in results["models"]
    ]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for label, colour, shares in curves:
        if shares:
            any_count = label == MODELS["sft"][0]
            bins = [100 * sum(shares[i : i + bin_width]) for i in range(1, len(shares), bin_width)]
            axes.stairs(
                bins,
                [1 + bin_width * i for i in range(len(bins) + 1)],
                color=colour,
                linewidth=2,
                linestyle=":" if any_count else "-",
                label=f"{label}, any number of terms" if any_count else label,
            )
    axes.set_xlabel(
        f"first term of a right answer of {results['task']['preferred_terms']} terms "
        f"(bins of {bin_width})"
    )
    axes.set_ylabel("share (%), all sums weighing alike")
    axes.legend()
    save(figure, folder, "oracle")


def draw_all(results, logs, folder):
    """Every figure that these results and logs have the material for."""
    names = list(results["models"])
    dpo_logs = {name: logs[name] for name in MODELS if "rewards/margins" in str(logs.get(name))}
    with plt.rc_context(STYLE):
        draw_histograms(results, folder)
        if logs.get("sft"):
            draw_sft_loss(logs["sft"], folder)
        if dpo_logs:
            draw_dpo_curves(dpo_logs, names, folder)
            draw_mass(dpo_logs, names, results["task"], folder)
            draw_tokens(results["tokens"], names, folder)
            if results["oracle"]["kl"]:
                draw_oracle(results, folder)
                draw_frontier(results, logs, folder)
