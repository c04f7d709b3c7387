"""The tables of README.md and plots/study/README.md, from the JSON of the parts of the study.

    python -m plots.study.tables     # or: make publish

Writes each table anew between its markers, `<!-- table models -->` and `<!-- end -->`, and draws
the figures of the study.
"""

import itertools
import json
import math
import re
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

import torch

from data import run_script, write_file
from evaluate import COLUMNS, MODELS, markdown, rounded
from plots.study import figures, frontier

FOLDER = Path(__file__).parent
PAGES = (FOLDER.parent.parent / "README.md", FOLDER / "README.md")
PARTS = ("methods", "rlhf", "interventions", "collapse", "judge")
BETA = 0.8
NEEDS = {  # what somebody must give: written answers, or verdicts on given ones
    "offline": "written pairs",
    "offline + NLL": "written pairs",
    "mistakes": "written answers, a check",
    "mistakes + NLL": "written answers, a check",
    "imitation": "written answers",
    "online": "a judge",
    "reference": "a judge",
    "reference + NLL": "a judge",
    "offline, IPO": "written pairs",
    "offline, smoothed": "written pairs",
    "RLHF": "written pairs",
}
YARDSTICK = "mistakes + NLL"  # what every other method is compared with


def read_study():
    """{part: content} of all parts that have been run."""
    paths = {part: FOLDER / f"{part}.json" for part in PARTS}
    return {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}


def methods_of(study):
    """{method: its runs}, with RLHF, but without SFT."""
    return {name: method["runs"] for name, method in figures.methods_of(study).items()}


def models_of(study):
    """{model: its runs}: those of the README, and RLHF."""
    models = {"SFT": study["methods"]["sft"]} | methods_of(study)
    return {name: models[name] for name in ("SFT", *MODELS, "RLHF") if name in models}


# ---- cells -----------------------------------------------------------------------------------


def cell(values, spread=True):
    """A mean and, of several values, their standard deviation: "0.987 ± 0.002"."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    digits = 3 if abs(mean(values)) < 10 else 1
    text = f"{round(mean(values), digits) + 0.0:.{digits}f}"  # no negative zero
    return text + (f" ± {stdev(values):.{digits}f}" if spread and len(values) > 1 else "")


def cells_of(runs, columns, without_spread=()):
    """A cell a column, each a value of a run; those `without_spread` show the mean alone."""
    return [cell(map(columns[name], runs), name not in without_spread) for name in columns]


def table(first, columns, rows, without_spread=()):
    """A row of cells for each {name: runs}."""
    rows = [[name, *cells_of(runs, columns, without_spread)] for name, runs in rows.items()]
    return markdown([first, *columns], rows)


def of_three_terms(result):
    return result["sampled"]["counts"].get("3", 0.0)


PREFERRED, EXACT, KL = (COLUMNS[name] for name in ("preferred", "exact", "KL (nats)"))
OWN = {  # of a policy's own answers, where a result has no more
    "preferred": itemgetter("preferred"),
    "exact": itemgetter("exact"),
    "KL": itemgetter("kl"),
}
EXCESS = "above the frontier"
PARTS_OF_KL = {
    "drift, preferred": lambda r: r["kl parts"]["preferred"],
    "drift, others": lambda r: r["kl parts"]["others"],
    EXCESS: lambda r: r["kl parts"]["excess"],
}


# ---- the tables of part 1 --------------------------------------------------------------------


def models_table(study):
    """The table of the top README: what evaluate.py prints."""
    return table("", {"3 terms": of_three_terms} | COLUMNS, models_of(study))


def more_table(study):
    """What else is measured of these models."""
    columns = {
        "exact: held-out sums": lambda r: r["held out"]["exact"],
        "sum of 100": lambda r: r["largest"],
    }
    return table("", columns, models_of(study))


def methods_table(study):
    """A row a method, with what it needs and the rate that was chosen."""
    columns = {"preferred": PREFERRED, "exact": EXACT} | PARTS_OF_KL
    rows = []
    for name, method in figures.methods_of(study).items():
        cells = cells_of(method["runs"], columns, ("drift, preferred", "drift, others"))
        rows.append([name, NEEDS[name], f"{method['settings']['lr']:g}", *cells])
    return markdown(["method", "needs", "lr", *columns], rows)


def asked_table(study):
    """The margin z and the share of preferred answers that a loss asks for, and what it gets."""
    ps = [torch.tensor(sft["p"], dtype=torch.float64) for sft in study["methods"]["sft"]]
    rows = []
    for name in ("offline, IPO", "offline, smoothed"):
        method = study["methods"]["methods"][name]
        beta, noise = (method["settings"].get(x) for x in ("beta", "label-smoothing"))
        z = math.log((1 - noise) / noise) / BETA if noise else 1 / (2 * beta)
        shares = [frontier.optimal_policy(p, z)[0] for p in ps]
        reached = [
            r["offline pairs"]["chosen"] - r["offline pairs"]["rejected"] for r in method["runs"]
        ]
        preferred = cell(map(PREFERRED, method["runs"]))
        rows.append([name, rounded(z), cell(reached), rounded(mean(shares)), preferred])
    return markdown(["", "z asked for", "z of pairs", "share asked for", "preferred"], rows)


def two_sided_p(t, df):
    """That of Student's t with 2 or 4 degrees of freedom (Abramowitz and Stegun, 26.7.4)."""
    sine, cosine_squared = abs(t) / math.sqrt(df + t * t), df / (df + t * t)
    return 1 - sine * (1 + (cosine_squared / 2 if df == 4 else 0))


T_95 = {2: 4.303, 4: 2.776}  # the 97.5 % quantiles, by degrees of freedom


def paired(value, runs, others):
    """The mean difference of a value, seed by seed, as text with its 95 % interval; and its p."""
    differences = [value(run) - value(other) for run, other in zip(runs, others)]
    df, difference = len(differences) - 1, mean(differences)
    error = stdev(differences) / math.sqrt(len(differences))
    low, high = difference - T_95[df] * error, difference + T_95[df] * error
    p = two_sided_p(difference / error, df) if error else 1.0
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]", p


def differences_table(study):
    """Every method less the yardstick; a star where p is below 0.05, corrected by Holm."""
    methods, metrics = methods_of(study), {EXCESS: PARTS_OF_KL[EXCESS], "preferred": PREFERRED}
    names = [name for name in methods if name != YARDSTICK]
    keys = list(itertools.product(names, metrics))
    found = {key: paired(metrics[key[1]], methods[key[0]], methods[YARDSTICK]) for key in keys}
    cells, differs = {}, True
    for rank, key in enumerate(sorted(keys, key=lambda key: found[key][1])):
        text, p = found[key]
        differs = differs and p * (len(keys) - rank) < 0.05
        cells[key] = text + " *" * differs
    rows = [[name, *(cells[name, metric] for metric in metrics)] for name in names]
    return markdown(["method", *metrics], rows)


def looks_table(study):
    """The policy's own answers at the start and at the first steps of the classic pairs."""
    rows = {}
    for looks in zip(*(run["looks"] for run in methods_of(study)["offline"])):
        rows[str(looks[0]["step"])] = looks
    start, *others = rows.items()
    columns = {key: OWN[key] for key in ("preferred", "exact")}
    return table("step", columns, dict([start, *others[4:6]]))


def tokens_table(study):
    """The next token at the end of rejected answers of two, four and five terms."""
    asked = [("end", "2"), ("end", "4"), ("end", "5"), ("right digit", "2")]
    columns = {
        f"{name}, {k} terms": lambda r, name=name, k=k: r["next token"][k][name]
        for name, k in asked
    }
    return table("", columns, models_of(study))


# ---- the tables of the other parts -----------------------------------------------------------


def rewards_table(study):
    """What the reward model says of right and wrong answers."""
    kinds = [k for k in study["rlhf"]["runs"][0]["rewards"] if k != "optimum"]
    rows = {kind: [run["rewards"][kind] for run in study["rlhf"]["runs"]] for kind in kinds}
    return table("answer", {"mean reward": lambda of_seed: of_seed[0]}, rows)


def optimum_table(study):
    """The optimum of the learned reward, as estimated, and where the runs end."""
    rlhf = study["rlhf"]
    rows = {"optimum, estimated": [run["rewards"]["optimum"] for run in rlhf["runs"]]}
    of_runs = {
        f"RLHF, lr {rlhf['settings']['lr']:g}": rlhf["runs"],
        f"RLHF, lr {rlhf['other lr']:g}": rlhf["other"],
        "RLHF without the KL": rlhf["without kl"],
    }
    for name, runs in of_runs.items():
        ends = [{"preferred": PREFERRED(run), "exact": EXACT(run), "kl": KL(run)} for run in runs]
        rows[name] = ends
    return table("", OWN, rows)


def interventions_table(study):
    """A row a variant of the classic pairs: what it reaches on its pairs, and what it answers.

    The last column is a check with another rate, on one seed.
    """
    columns = {
        "loss": lambda r: r["loss"],
        "z of its pairs": lambda r: r["z of pairs"],
        "preferred": PREFERRED,
        "exact": EXACT,
        "KL": KL,
    }
    (_, of_variants), (lr, others) = study["interventions"].items()
    rows = []
    for name, runs in of_variants.items():
        cells = cells_of(runs, columns, ("loss", "z of its pairs", "KL"))
        gain = "" if name == "offline" else paired(EXACT, runs, of_variants["offline"])[0]
        rows.append([name, *cells, gain, cell(map(EXACT, others[name]))])
    header = ["variant", *columns, "exact, less offline", f"exact, lr {float(lr):g}"]
    return markdown(header, rows)


def collapse_table(study):
    """A row a change of one setting of the classic pairs."""
    return table("changed", OWN, study["collapse"], ["KL"])


def judge_table(study):
    """A row a setting with a noisy judge. All were also trained twice as long, on one seed."""
    columns = {
        "optimum": lambda r: r["predicted"]["preferred"],
        "its KL": lambda r: r["predicted"]["kl"],
    } | OWN
    longer = {name_of(entry): entry["runs"] for entry in study["judge"]["longer"]}
    rows = []
    for entry in study["judge"]["study"]:
        cells = cells_of(entry["runs"], columns, ["optimum", "its KL"])
        twice = cell([run["preferred"] for run in longer.get(name_of(entry), [])])
        rows.append([*name_of(entry), *cells, twice])
    return markdown(["answers, loss", "β", *columns, "preferred, twice the steps"], rows)


def identity_table(study):
    """The margin z at the smallest beta, and its parts in the policy's own answers."""
    columns = {
        "z, SFT's answers": lambda r: r["z"]["reference"],
        "z, own answers": lambda r: r["z parts"]["z"],
        "log-odds": lambda r: r["z parts"]["log-odds"],
        "+ KL, preferred": lambda r: r["z parts"]["preferred"],
        "− KL, others": lambda r: r["z parts"]["others"],
    }
    of_judge = study["judge"]["study"]
    smallest = min(entry["settings"]["beta"] for entry in of_judge)
    entries = [entry for entry in of_judge if entry["settings"]["beta"] == smallest]
    rows = {name_of(entry)[0]: entry["runs"] for entry in entries}
    return table("answers, loss", columns, rows, columns)


def name_of(entry):
    """The first cells of a row of the noisy judge: what is trained on, and beta."""
    settings = entry["settings"]
    beta = "" if settings["loss"] == "imitation" else f"{settings['beta']:g}"
    return f"{settings['answers']}, {settings['loss']}", beta


TABLES = {
    "models": models_table,
    "more": more_table,
    "methods": methods_table,
    "asked": asked_table,
    "differences": differences_table,
    "looks": looks_table,
    "tokens": tokens_table,
    "rewards": rewards_table,
    "optimum": optimum_table,
    "interventions": interventions_table,
    "collapse": collapse_table,
    "judge": judge_table,
    "identity": identity_table,
}


# ---- the pages -------------------------------------------------------------------------------


def fill(text, study):
    """A page with every table between its markers written anew."""

    def filled(found):
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]](study)}\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def main():
    """Makes everything before it writes anything."""
    study = read_study()
    with_rewards = {name: methods_of(study)[name] for name in (*MODELS, "imitation")}
    drawn = figures.draw_study(study, with_rewards, BETA)
    pages = {page: fill(page.read_text(encoding="utf-8"), study) for page in PAGES}
    figures.save_study(drawn)
    for page, text in pages.items():
        write_file(page, text.encode())


if __name__ == "__main__":
    run_script(main)
