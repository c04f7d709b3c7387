"""The tables of README.md and plots/study/README.md, from the JSON of the parts of the study.

    python -m plots.study.tables     # or: make publish

Writes each table anew between its markers, `<!-- table models -->` and `<!-- end -->`, and draws
the figures of the study.
"""

import json
import math
import re
from operator import itemgetter
from statistics import mean, median, stdev

import torch

from data import InputError, run_script, write_file
from evaluate import COLUMNS, markdown, rounded
from plots.study import figures, frontier
from plots.study.runs import BETA, FOLDER

PAGES = (FOLDER.parent.parent / "README.md", FOLDER / "README.md")
PARTS = ("methods", "rlhf", "interventions", "collapse", "judge")
MADE = ("offline", "offline + KL", "mistakes")  # the methods of `make`
NEEDS = {  # what somebody must give: written answers, or verdicts on given ones
    "offline": "written pairs",
    "offline + KL": "written pairs",
    "mistakes": "written answers, a judge",
    "offline + NLL": "written pairs",
    "imitation": "written answers",
    "online": "a judge",
    "reference": "a judge",
    "reference + KL": "a judge",
    "offline, smoothed": "written pairs",
    "RLHF": "written pairs",
}
YARDSTICK = "offline + KL"
ALIKE = ("mistakes", "offline + NLL", "imitation", "online", "reference + KL", "RLHF")  # in shares


def read_study():
    """{part: content}; every part must have been run."""
    paths = {part: FOLDER / f"{part}.json" for part in PARTS}
    missing = [part for part, path in paths.items() if not path.exists()]
    if missing:
        raise InputError(f"no results of {', '.join(missing)}; make {missing[0]} computes them")
    return {part: json.loads(path.read_text()) for part, path in paths.items()}


def methods_of(study):
    """{method: its settings, what was tried, and its runs}, with RLHF."""
    return study["methods"]["methods"] | study["rlhf"]["methods"]


def runs_of(study):
    """{method: its runs}, with SFT and RLHF."""
    runs = {name: method["runs"] for name, method in methods_of(study).items()}
    return {"SFT": study["methods"]["sft"]} | runs


# ---- cells -----------------------------------------------------------------------------------


def cell(values, spread=True):
    """A mean and, of several values, their standard deviation: "0.987 ± 0.002"."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    digits = 3 if abs(mean(values)) < 10 else 1
    text = f"{mean(values):z.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else "")


def cells_of(runs, columns, without_spread=()):
    """A cell per column, each a value of a run; those `without_spread` show the mean alone."""
    return [cell(map(columns[name], runs), name not in without_spread) for name in columns]


T_95 = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)


def paired(value, runs, others):
    """The mean difference of a value, seed by seed, with its 95 % interval, as text.

    By Student's t, whose quantiles T_95 are for 2 to 10 seeds.
    """
    differences = [value(run) - value(other) for run, other in zip(runs, others)]
    error = T_95[len(differences) - 2] * stdev(differences) / math.sqrt(len(differences))
    difference = mean(differences)
    return f"{difference:+.3f} [{difference - error:+.3f}, {difference + error:+.3f}]"


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
    """The table of the top README: what evaluate.py prints, the error as a median over seeds."""
    columns, rows, of_models = {"3 terms": of_three_terms} | COLUMNS, [], runs_of(study)
    for name in ("SFT", *MADE, "RLHF", "RLHF without the KL"):
        runs = of_models[name]
        cells = dict(zip(columns, cells_of(runs, columns)))
        errors = [COLUMNS["mean abs. error"](run) for run in runs]
        cells["mean abs. error"] = rounded(median(errors))
        rows.append([name, *cells.values()])
    return markdown(["", *columns], rows)


def methods_table(study):
    """A row per method, with what it needs and the rate that was chosen."""
    columns = {"preferred": PREFERRED, "exact": EXACT} | PARTS_OF_KL
    methods, rows = methods_of(study), []
    for name, needed in NEEDS.items():
        runs, lr = methods[name]["runs"], methods[name]["settings"]["lr"]
        cells = cells_of(runs, columns, ("drift, preferred", "drift, others"))
        rows.append([name, needed, f"{lr:g}", *cells])
    return markdown(["method", "needs", "lr", *columns], rows)


def differences_table(study):
    """Methods that reach about as many preferred answers as the yardstick, less the yardstick."""
    metrics = {EXCESS: PARTS_OF_KL[EXCESS], "preferred": PREFERRED}
    of_methods, rows = runs_of(study), []
    for name in ALIKE:
        both = of_methods[name], of_methods[YARDSTICK]
        rows.append([name, *(paired(metric, *both) for metric in metrics.values())])
    return markdown(["method", *metrics], rows)


def directions_table(study):
    """The KL on the policy's own answers, given to DPO and taken from RLHF."""
    without = {"offline + KL": "offline", "RLHF": "RLHF without the KL"}
    names = {"offline": "DPO", "offline + KL": "DPO + KL", "RLHF": "RLHF"}
    of_methods, rows = runs_of(study), []
    for name in ("offline", "offline + KL", "RLHF without the KL", "RLHF"):
        runs, others = of_methods[name], of_methods.get(without.get(name))
        gain = paired(EXACT, runs, others) if others else ""
        rows.append([names.get(name, name), *cells_of(runs, OWN_ANSWERS), gain])
    return markdown(["", *OWN_ANSWERS, "exact, less without the KL"], rows)


def weights_table(study):
    """DPO with the KL on the policy's own answers, by its weight, beside the predicted optimum."""
    ps = [torch.tensor(sft["p"], dtype=torch.float64) for sft in study["methods"]["sft"]]
    columns = OWN_ANSWERS | {EXCESS: PARTS_OF_KL[EXCESS]}
    rows = []
    for weight, runs in study["methods"]["kl weights"].items():
        optima = [frontier.optimum_with_kl(p, float(weight), BETA) for p in ps[: len(runs)]]
        predicted = [cell(values, spread=False) for values in zip(*optima)]
        rows.append([weight, *predicted, *cells_of(runs, columns)])
    return markdown(["λ", "optimum", "its KL", *columns], rows)


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
    variants, rows = {"offline": methods_of(study)["offline"]} | study[part], []
    seeds = min(len(variant["runs"]) for variant in variants.values())
    offline = variants["offline"]["runs"][:seeds]
    for name, variant in variants.items():
        runs = variant["runs"][:seeds]
        gain = "" if name == "offline" else paired(EXACT, runs, offline)
        cells = cells_of(runs, columns, ("z of its pairs", "KL"))
        rows.append([name, f"{variant['settings']['lr']:g}", *cells, gain])
    return markdown([first, "lr", *columns, "exact, less offline"], rows)


def looks_table(study):
    """The pairs that are won and the policy's own answers over the steps of offline pairs."""
    start, *others = zip(*(run["looks"] for run in runs_of(study)["offline"]))
    names = ("pairs won", "preferred", "exact", "kl")
    columns = {name: itemgetter(name) for name in names}
    rows = [[str(x[0]["step"]), *cells_of(x, columns)] for x in (start, *others[-13::4])]
    return markdown(["step", *names[:-1], "KL"], rows)


def judge_table(study):
    """A row per kind and beta: the optimum, the end of the runs, and the shares at all rates."""
    columns = {
        "optimum": lambda r: r["optimum"]["preferred"],
        "its KL": lambda r: r["optimum"]["kl"],
    } | OWN_ANSWERS
    rows = []
    for entry in study["judge"]["study"].values():
        settings, cells = entry["settings"], cells_of(entry["runs"], columns, ["optimum", "its KL"])
        tried = sorted((other["lr"], share) for other, share, _ in entry["tried"])
        by_rate = ", ".join(f"{lr:g}: {share:.2f}" for lr, share in tried)
        names = [settings["kind"], f"{settings['beta']:g}"]
        rows.append([*names, *cells, by_rate])
    return markdown(["", "β", *columns, "preferred by lr, seed 0"], rows)


TABLES = {
    "models": models_table,
    "methods": methods_table,
    "differences": differences_table,
    "directions": directions_table,
    "weights": weights_table,
    "interventions": interventions_table,
    "collapse": collapse_table,
    "looks": looks_table,
    "judge": judge_table,
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
    figures.draw_study(study, runs_of(study), FOLDER)
    for page, text in pages.items():
        write_file(page, text.encode())


if __name__ == "__main__":
    run_script(main)
