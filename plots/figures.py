"""Every figure: those of one evaluation, for evaluate.py, and of many runs, for plots/tables.py.

Nothing here measures: all numbers come from results, logs and published.json.
"""

import io
import os

import matplotlib.style
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
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


def smooth(values, window=9):
    """Running mean over the `window` values around each; fewer at the ends."""
    half = window // 2
    return [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


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
        looks = looks_of(log)
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


def save_animation(logs, terms, folder):
    """The histograms of the policy's own answers over the steps, as a GIF; returns its path."""
    looks = {name: looks_of(log) for name, log in logs.items()}
    width = 1 + 3.1 * len(logs)
    figure = Figure(figsize=(width, 3.8), layout="none")  # else every frame is laid out anew
    figure.subplots_adjust(0.75 / width, 0.14, 1 - 0.05 / width, 0.88, wspace=0.06)
    row = figure.subplots(1, len(logs), sharey=True, squeeze=False)[0]

    def draw(frame):
        for axes, (name, records) in zip(row, looks.items()):
            axes.clear()
            record = records[min(frame, len(records) - 1)]
            title = f"{label(name)}, step {record['step']}"
            draw_histogram(axes, record["own"], title, colour(name, logs), terms, 5)
        row[0].set_ylabel("share of the policy's own answers (%)")
        row[0].legend(loc="upper right")

    path = os.path.join(folder, "dist.gif")
    last = max(map(len, looks.values())) - 1
    frames = [*range(min(8, last)), *range(8, last, 3), *[last] * 3]  # and a pause at the end
    animation = FuncAnimation(figure, draw, frames)
    animation.save(f"{path}.tmp.gif", PillowWriter(fps=3), dpi=70)
    os.replace(f"{path}.tmp.gif", path)
    return path


def draw_all(results, logs, folder):
    """Every figure that these results and logs have the material for; returns their paths."""
    dpo_logs = {name: log for name, log in logs.items() if looks_of(log)}
    with matplotlib.style.context(["default", STYLE]):
        paths = [save(draw_histograms(results), folder, "dist")]
        if logs.get("sft"):
            paths.append(save(draw_sft(logs["sft"]), folder, "sft_gap"))
        if dpo_logs:
            terms = results["task"]["preferred_terms"]
            paths.append(save(draw_mass(dpo_logs, terms), folder, "mass"))
            paths.append(save_animation(dpo_logs, terms, folder))
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


def draw_methods(axes, published):
    """The frontier, and a mark where each run ends."""
    shares, kls = np.array(published["frontier"]["curve"]).T
    axes.plot(kls, 100 * shares, color="black", label="frontier: least KL")
    for name, method in published["methods"].items():
        color = METHOD_COLOURS[name.replace(",", "").split(" ")[0]]
        marker = next((m for word, m in METHOD_MARKERS.items() if word in name), "o")
        face = "none" if marker != "o" else color
        style = {"edgecolors": color, "facecolors": face, "marker": marker, "s": 26}
        kl = [run["kl"] for run in method["runs"]]
        preferred = [100 * run["sampled"]["preferred"] for run in method["runs"]]
        axes.scatter(kl, preferred, label=name, zorder=3, **style)


def draw_frontier(published):
    """Share of preferred answers against KL: the least that any policy pays, and the methods.

    Marks are the ends of all runs, enlarged on the right. A line is the path of a run.
    """
    figure = Figure(figsize=(10, 5))
    axes, close_up = figure.subplots(1, 2, width_ratios=(1.5, 1))
    draw_methods(axes, published)
    draw_methods(close_up, published)
    for name in ("offline", "offline + NLL", "mistakes"):
        looks = published["methods"][name]["runs"][0]["looks"]
        kl, preferred = [r["kl"] for r in looks], [100 * r["preferred"] for r in looks]
        style = {"color": METHOD_COLOURS[name.split(" ")[0]], "linewidth": 0.9}
        axes.plot(kl, preferred, linestyle=":" if "NLL" in name else "-", **style)
    for n, share, kl in published["frontier"]["best of n"]:
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
    close_up.set_xlim(1.2, 1.8)
    close_up.set_ylim(96, 100)
    close_up.set_xlabel("KL from SFT (nats)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_rewards(runs, beta):
    """Mean rewards of the two sides of offline pairs, a dot a seed; the ceiling of the chosen."""
    figure = Figure(figsize=(8, 2.4))
    chosen, rejected = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    models = [model for model in runs if model != "sft"]
    for axes, side in ((chosen, "chosen"), (rejected, "rejected")):
        for i, model in enumerate(models):
            rewards = [beta * run["offline pairs"][side] for run in runs[model]]
            axes.plot(rewards, [i] * len(rewards), "o", color=colour(model, runs), alpha=0.7)
        axes.axvline(0, color="#888888", linewidth=1)
        axes.set_xlabel(f"mean reward of the {side} side (β × nats)")
    ceiling = beta * np.mean([run["offline pairs"]["ceiling"] for run in runs[models[0]]])
    chosen.axvline(ceiling, color="black", linestyle="--")
    chosen.annotate("ceiling", (ceiling, 0.5), (-4, 0), ha="right", textcoords="offset points")
    chosen.set_yticks(range(len(models)), [label(model) for model in models])
    chosen.set_ylim(len(models) - 0.5, -0.5)
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


def draw_optimum(optimum):
    """The share of preferred answers at which runs with a noisy judge end, over beta."""
    of_loss = {"sigmoid": [], "imitation": []}
    for entry in optimum["study"]:
        of_loss[entry["settings"]["loss"]].append(entry)
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    for pairs, marker in (("online", "o"), ("reference", "s")):
        study = [entry for entry in of_loss["sigmoid"] if entry["settings"]["pairs"] == pairs]
        betas = [entry["settings"]["beta"] for entry in study]
        shares = [[100 * run["preferred"] for run in entry["runs"]] for entry in study]
        means, deviations = np.mean(shares, axis=1), np.std(shares, axis=1, ddof=1)
        style = {"color": METHOD_COLOURS[pairs], "marker": marker, "linestyle": "none"}
        axes.errorbar(betas, means, deviations, capsize=3, label=f"{pairs} pairs", **style)
    predicted = [np.mean([r["predicted"]["preferred"] for r in entry["runs"]]) for entry in study]
    axes.plot(betas, 100 * np.array(predicted), color="black", zorder=1, label="predicted optimum")
    (winners,) = of_loss["imitation"]
    share = 100 * np.mean([run["preferred"] for run in winners["runs"]])
    axes.axhline(share, color="#888888", linestyle="--", label="imitation of the winners")
    axes.set_xscale("log")
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    axes.set_ylim(0, 100)
    axes.set_xlabel("β (logarithmic)")
    axes.set_ylabel("preferred answers (%)")
    axes.legend()
    return figure


def draw_published(published, runs, optimum, folder):
    """The figures of many runs; `runs` maps the models of the README to their results."""
    with matplotlib.style.context(["default", STYLE]):
        save(draw_frontier(published), folder, "frontier")
        save(draw_rewards(runs, 0.8), folder, "rewards")
        save(draw_next_token(runs), folder, "next_token")
        save(draw_optimum(optimum), folder, "optimum")
