"""The tables of README.md and plots/study/README.md, from the JSON of the parts of the study.

    python -m plots.study.tables

It writes each table anew between its markers, `<!-- table models -->` and `<!-- end -->`, and draws
the figures of the study. `make publish` does the same.
"""

import argparse
import json
import math
import re
from operator import itemgetter
from statistics import mean, stdev

import torch

from data import InputError, run_script, write_file
from evaluate import COLUMNS, markdown
from plots.study import figures, frontier
from plots.study.runs import BETA, FOLDER, RATES

PAGES = (FOLDER.parent.parent / "README.md", FOLDER / "README.md")
PARTS = ("methods", "rlhf", "interventions", "collapse")
NEEDS = {  # what somebody must give: written answers, or verdicts on given ones
    "offline": "written pairs",
    "offline + KL": "written pairs",
    "offline + NLL": "written pairs",
    "mistakes": "written answers, a judge",
    "imitation": "written answers",
    "online": "a judge",
    "reference": "a judge",
    "reference + KL": "a judge",
    "offline, smoothed": "written pairs",
    "RLHF": "written pairs",
}
YARDSTICK = "offline + KL"
ALIKE = ("offline + NLL", "mistakes", "imitation", "online", "reference + KL", "RLHF")  # in shares


def read_study():
    """{part: content}; every part must have been run."""
    paths = {part: FOLDER / f"{part}.json" for part in PARTS}
    missing = [part for part, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(f"no results of {', '.join(missing)}; make {missing[0]} computes them")
    return {part: json.loads(path.read_text()) for part, path in paths.items()}


def rows_of(study):
    """{name: its settings, what was tried, and its results} of every part."""
    methods = study["methods"]["methods"] | study["rlhf"]["methods"]
    return methods | study["interventions"] | study["collapse"]


def results_of(study):
    """{name: its results at its best rate}, with SFT."""
    results = {name: row["results"] for name, row in rows_of(study).items()}
    return {"SFT": study["methods"]["sft"]} | results


# ---- cells -----------------------------------------------------------------------------------


def cell(values, spread=True):
    """A mean and, of several values, their standard deviation: "0.987 ± 0.002"."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    digits = 3 if abs(mean(values)) < 10 else 1
    text = f"{mean(values):z.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else "")


def cells_of(results, columns, without_spread=()):
    """A cell per column, each a value of a result; those `without_spread` show the mean alone."""
    return [cell(map(columns[name], results), name not in without_spread) for name in columns]


T_95 = {3: 4.30265, 5: 2.77645}  # quantiles of Student's t by the number of seeds


def paired(value, results, others):
    """The mean difference of a value, seed by seed, with its 95 % interval, as text."""
    differences = [value(result) - value(other) for result, other in zip(results, others)]
    n, difference = len(differences), mean(differences)
    error = T_95[n] * stdev(differences) / math.sqrt(n)
    return f"{difference:+z.3f} [{difference - error:+z.3f}, {difference + error:+z.3f}]"


def rate_of(row):
    """The learning rate that was chosen; it says so where no rate beyond it was tried."""
    lr = row["settings"]["lr"]
    edge = {min(RATES): " (lowest)", max(RATES): " (highest)"}.get(lr, "")
    return figures.rate_text(lr) + edge


def of_three_terms(result):
    return result["sampled"]["counts"].get("3", 0.0)


PREFERRED, EXACT, KL = (COLUMNS[name] for name in ("preferred", "exact", "KL (nats)"))
OWN_ANSWERS = {"preferred": PREFERRED, "exact": EXACT, "KL": KL}
EXCESS = "above the frontier"
PARTS_OF_KL = {
    "drift, preferred": lambda r: r["kl parts"]["preferred"],
    "drift, others": lambda r: r["kl parts"]["others"],
    EXCESS: lambda r: r["kl parts"]["excess"],
}


# ---- the tables ------------------------------------------------------------------------------


def models_table(study):
    """The table of the top README: what evaluate.py prints, at the default rate."""
    columns = {"3 terms": of_three_terms} | COLUMNS
    models = {"SFT": study["methods"]["sft"]} | study["methods"]["default rate"]
    rows = [[name, *cells_of(results, columns)] for name, results in models.items()]
    return markdown(["", *columns], rows)


def methods_table(study):
    """A row per method, with what it needs and the rate that was chosen."""
    columns, rows = {"preferred": PREFERRED, "exact": EXACT} | PARTS_OF_KL, []
    for name, needed in NEEDS.items():
        row = rows_of(study)[name]
        cells = cells_of(row["results"], columns, ("drift, preferred", "drift, others"))
        rows.append([name, needed, rate_of(row), *cells])
    return markdown(["method", "needs", "lr", *columns], rows)


def differences_table(study):
    """Methods that reach about as many preferred answers as the yardstick, minus the yardstick."""
    metrics = {EXCESS: PARTS_OF_KL[EXCESS], "preferred": PREFERRED}
    results, rows = results_of(study), []
    for name in ALIKE:
        both = results[name], results[YARDSTICK]
        rows.append([name, *(paired(metric, *both) for metric in metrics.values())])
    return markdown(["method", *metrics], rows)


def directions_table(study):
    """The KL on the policy's own answers, given to DPO and taken from RLHF."""
    without = {"offline + KL": "offline", "RLHF": "RLHF without the KL"}
    names = {"offline": "DPO", "offline + KL": "DPO + KL"}
    results, rows = results_of(study), []
    for name in ("offline", "offline + KL", "RLHF without the KL", "RLHF"):
        gain = paired(EXACT, results[name], results[without[name]]) if name in without else ""
        rate, cells = rate_of(rows_of(study)[name]), cells_of(results[name], OWN_ANSWERS)
        rows.append([names.get(name, name), rate, *cells, gain])
    return markdown(["", "lr", *OWN_ANSWERS, "exact, minus without the KL"], rows)


def rates_table(study):
    """Offline pairs at every rate."""
    rows = []
    for row in study["methods"]["offline at every rate"]:
        rate = figures.rate_text(row["settings"]["lr"])
        rows.append([rate, *cells_of(row["results"], OWN_ANSWERS)])
    return markdown(["lr", *OWN_ANSWERS], rows)


def optima_table(study):
    """Offline pairs with the KL on own answers, by its weight and beta, beside the prediction."""
    ps = [torch.tensor(sft["p"], dtype=torch.float64) for sft in study["methods"]["sft"]]
    columns, rows = OWN_ANSWERS | {EXCESS: PARTS_OF_KL[EXCESS]}, []
    for change in study["methods"]["changes"]:
        settings = {"kl-weight": 0.1, "beta": BETA} | change["settings"]
        optima = [
            frontier.optimum_with_kl(p, *settings.values()) for p in ps[: len(change["results"])]
        ]
        predicted = [cell(values, spread=False) for values in zip(*optima)]
        rows.append([*(f"{x:g}" for x in settings.values()), *predicted])
        rows[-1] += cells_of(change["results"], columns)
    return markdown(["λ", "β", "optimum", "its KL", *columns], rows)


def interventions_table(study):
    """A row per variant of offline pairs: its rate, z at the end, and what the policy answers."""

    def z(result):
        sides = result.get("offline pairs")  # part 1 measures both
        return sides["chosen"] - sides["rejected"] if sides else result["z of pairs"]

    columns = {"z of its pairs": z} | OWN_ANSWERS
    return variants_table("rejected side", columns, study, "interventions")


def collapse_table(study):
    """A row per change of one setting of offline pairs."""
    return variants_table("changed", OWN_ANSWERS, study, "collapse")


def variants_table(first, columns, study, part):
    """A row for offline pairs and for each variant of them, at its best rate."""
    variants, rows = {"offline": rows_of(study)["offline"]} | study[part], []
    seeds = min(len(variant["results"]) for variant in variants.values())
    offline = variants["offline"]["results"][:seeds]
    for name, variant in variants.items():
        results = variant["results"][:seeds]
        gain = "" if name == "offline" else paired(EXACT, results, offline)
        rows.append(
            [name, rate_of(variant), *cells_of(results, columns, ("z of its pairs",)), gain]
        )
    return markdown([first, "lr", *columns, "exact, minus offline"], rows)


def looks_table(study):
    """The pairs that are won and the policy's own answers over the first steps of offline pairs."""
    looks = [*zip(*(result["looks"] for result in study["methods"]["default rate"]["offline"]))]
    names = ("pairs won", "preferred", "exact", "kl")
    columns = {name: itemgetter(name) for name in names}
    shown = (looks[0], *looks[3:8], looks[-1])  # steps 0, 4, 8, 16, 31, 62 and 500
    rows = [[str(x[0]["step"]), *cells_of(x, columns)] for x in shown]
    return markdown(["step", *names[:-1], "KL"], rows)


TABLES = {
    "models": models_table,
    "rates": rates_table,
    "methods": methods_table,
    "differences": differences_table,
    "directions": directions_table,
    "optima": optima_table,
    "interventions": interventions_table,
    "collapse": collapse_table,
    "looks": looks_table,
}


# ---- the pages -------------------------------------------------------------------------------


def fill(text, study):
    """A page with every table between its markers written anew."""

    def filled(found):
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]](study)}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def main():
    """Makes everything before it writes a page."""
    study = read_study()
    pages = {page: fill(page.read_text(encoding="utf-8"), study) for page in PAGES}
    figures.draw_study(study, rows_of(study), results_of(study), FOLDER)
    for page, text in pages.items():
        write_file(page, text.encode())


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes the tables and figures of the study.").parse_args()
    run_script(main)
