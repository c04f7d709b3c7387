"""The tables of README.md and plots/RESULTS.md, from plots/published.json and optimum.json.

    python -m plots.tables     # or: make publish

Writes each table anew between its markers, `<!-- table models -->` and `<!-- end -->`, and draws
the figures of many runs.
"""

import json
import re
import statistics
from pathlib import Path

from data import atomic_write, run_script
from plots import figures

PLOTS = Path(__file__).parent
PUBLISHED, OPTIMUM = PLOTS / "published.json", PLOTS / "optimum.json"
PAGES = (PLOTS.parent / "README.md", PLOTS / "RESULTS.md")


def three_terms(result, terms=3):
    return result["sampled"]["counts"].get(str(terms), 0.0)


def exact_three_terms(result, terms=3):
    """Share of the three-term answers that are exact; None without such an answer."""
    given = three_terms(result, terms)
    return result["sampled"]["exact_counts"].get(str(terms), 0.0) / given if given else None


SHORT = {  # column of the README: its value of a model's result
    "preferred": lambda r: r["sampled"]["preferred"],
    "exact": lambda r: r["sampled"]["exact"],
    "mean abs. error": lambda r: r["sampled"]["mae"],
    "parse rate": lambda r: r["sampled"]["parse_rate"],
    "KL (nats)": lambda r: r["kl"],
    "seconds": lambda r: r["seconds"],
}
KL_PARTS = {
    "needed": lambda r: r["kl parts"]["needed"],
    "drift, preferred": lambda r: r["kl parts"]["preferred"],
    "drift, others": lambda r: r["kl parts"]["others"],
    "above the frontier": lambda r: r["kl parts"]["excess"],
}
LONG = {  # row of the results page
    "three terms": three_terms,
    **SHORT,
    "exact of three-term answers": exact_three_terms,
    "exact, held-out sums": lambda r: r["held out"]["exact"],
    "exact, sum of 100": lambda r: r["largest"],
    "exact, worst sum": lambda r: r["worst sum"][1],
    "exact, sums outside 5..100": lambda r: r["outside"],
    "preferred, greedy": lambda r: r["greedy"]["preferred"],
    "exact, greedy": lambda r: r["greedy"]["exact"],
    "gap to the entropy floor (nats)": lambda r: r["gap"],
    **KL_PARTS,
}
METHOD = {
    "preferred": SHORT["preferred"],
    "exact": SHORT["exact"],
    "exact of three-term answers": exact_three_terms,
    "mean abs. error": SHORT["mean abs. error"],
    **KL_PARTS,
    "seconds": SHORT["seconds"],
}
NEXT_TOKEN = ("end", "plus sign", "digit", "right digit", "other digit")
COMPARISONS = [  # two methods and the column in which they are compared
    ("imitation", "mistakes + NLL", "above the frontier"),
    ("offline + NLL", "mistakes + NLL", "above the frontier"),
    ("mistakes", "mistakes + NLL", "above the frontier"),
    ("mistakes", "offline + NLL", "preferred"),
    ("mistakes", "offline + NLL", "exact"),
    ("mistakes + NLL", "imitation", "preferred"),
    ("mistakes + NLL", "mistakes", "preferred"),
    ("online", "mistakes", "preferred"),
]
T_95 = 2.776  # the 97.5 % quantile of Student's t for the differences of five seeds


# ---- Markdown --------------------------------------------------------------------------------


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(values):
    """A mean and, of several values, their standard deviation: "0.987 ± 0.002"."""
    if None in values:
        return ""
    mean = statistics.mean(values)
    digits = 3 if abs(mean) < 10 else 1
    text = f"{round(mean, digits) + 0.0:.{digits}f}"  # no negative zero
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def row(name, columns, runs):
    return [name, *(cell([value(run) for run in runs]) for value in columns.values())]


def models_table(runs, terms=3):
    """The table of the README, a row a model, of {model: results of its runs}."""
    columns = {f"{terms} terms": lambda r: three_terms(r, terms), **SHORT}
    rows = [row(figures.label(name), columns, runs[name]) for name in figures.in_order(runs)]
    return markdown(["", *columns], rows)


def published_runs(content):
    """{model of the README: its results over the seeds}; its label is the name of its method."""
    methods = {name: method["runs"] for name, method in content["methods"].items()}
    methods["SFT"] = content["sft"]
    return {model: methods[figures.label(model)] for model in figures.MODELS}


def long_table(content):
    """A row a metric, a column a model."""
    runs = published_runs(content)
    rows = [
        [metric, *(cell([value(run) for run in of_model]) for of_model in runs.values())]
        for metric, value in LONG.items()
    ]
    return markdown(["", *map(figures.label, runs)], rows)


def methods_table(content):
    """A row a method, with the rate that was chosen."""
    rows = []
    for name, method in content["methods"].items():
        settings = dict(method["settings"])
        rate = f"{settings.pop('lr'):g}"
        flags = " ".join(f"--{flag} {value}" for flag, value in settings.items())
        rows.append([name, f"`{flags}`", rate, *row("", METHOD, method["runs"])[1:]])
    return markdown(["method", "flags", "lr", *METHOD], rows)


def next_token_table(content):
    columns = {key: lambda r, key=key: r["next token"][key] for key in NEXT_TOKEN}
    runs = published_runs(content)
    return markdown(["", *columns], [row(figures.label(m), columns, runs[m]) for m in runs])


def differences_table(content):
    """Mean differences of two methods over the seeds, with 95 % intervals."""
    rows = []
    for one, other, metric in COMPARISONS:
        paired = zip(*(content["methods"][name]["runs"] for name in (one, other)))
        differences = [METHOD[metric](a) - METHOD[metric](b) for a, b in paired]
        mean = statistics.mean(differences)
        half = T_95 * statistics.stdev(differences) / len(differences) ** 0.5
        verdict = "none seen" if abs(mean) <= half else "yes"
        interval = f"{mean - half:+.3f} to {mean + half:+.3f}"
        rows.append([f"{one} vs. {other}", metric, f"{mean:+.3f}", interval, verdict])
    return markdown(["methods", "value", "difference", "95 % interval", "different"], rows)


def looks_table(content):
    """The policy's own answers at the first steps of the classic pairs and at the last one."""
    keys, rows = ("preferred", "exact", "kl"), []
    for looks in zip(*(run["looks"] for run in content["methods"]["offline"]["runs"])):
        cells = [cell([look[key] for look in looks]) for key in keys]
        rows.append([str(looks[0]["step"]), *cells])
    return markdown(["step", "preferred", "exact", "KL (nats)"], rows[:9] + rows[-1:])


def optimum_table(entries):
    """A row a setting of the study with a noisy judge."""
    columns = {
        "share predicted": lambda r: r["predicted"]["preferred"],
        "preferred": lambda r: r["preferred"],
        "exact": lambda r: r["exact"],
        "KL predicted": lambda r: r["predicted"]["kl"],
        "KL": lambda r: r["kl"],
        "z, own answers": lambda r: r["z"]["policy"],
        "z, SFT's answers": lambda r: r["z"]["reference"],
    }
    rows = []
    for entry in entries:
        settings = entry["settings"]
        imitation = settings["loss"] == "imitation"
        name = f"{settings['pairs']}, imitation" if imitation else settings["pairs"]
        beta = "" if imitation else f"{settings['beta']:g}"
        start = [name, beta, f"{settings['lr']:g}", str(settings["steps"])]
        rows.append(start + row("", columns, entry["runs"])[1:])
    return markdown(["pairs", "β", "lr", "steps", *columns], rows)


TABLES = {
    "differences": differences_table,
    "looks": looks_table,
    "models": lambda content: models_table(published_runs(content)),
    "long": long_table,
    "methods": methods_table,
    "next-token": next_token_table,
    "optimum": lambda content: optimum_table(content["optimum"]["study"]),
    "optimum-checks": lambda content: optimum_table(content["optimum"]["checks"]),
}


def fill(text, content):
    """A page with every table between its markers written anew."""

    def table(found):
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]](content)}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def read_published():
    """The content of published.json, with that of optimum.json as "optimum"."""
    return json.loads(PUBLISHED.read_text()) | {"optimum": json.loads(OPTIMUM.read_text())}


def main():
    content = read_published()
    figures.draw_published(content, published_runs(content), content["optimum"], PLOTS)
    for page in PAGES:
        atomic_write(page, fill(page.read_text(encoding="utf-8"), content).encode())


if __name__ == "__main__":
    run_script(main)
