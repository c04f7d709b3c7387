"""The tables of README.md and plots/study/README.md, from the JSON of the parts of the study.

    python -m plots.study.tables     # or: make publish

Writes each table anew between its markers, `<!-- table models -->` and `<!-- end -->`, and draws
the figures of the study.
"""

import itertools
import json
import math
import re
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


def cell(values):
    """A mean and, of several values, their standard deviation: "0.987 ± 0.002"."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    digits = 3 if abs(mean(values)) < 10 else 1
    text = f"{round(mean(values), digits) + 0.0:.{digits}f}"  # no negative zero
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(first, columns, rows):
    """A row of cells for each {name: runs}; `columns` map names to values of a run."""
    lines = [
        [name, *(cell([value(run) for run in runs]) for value in columns.values())]
        for name, runs in rows.items()
    ]
    return markdown([first, *columns], lines)


def of_three_terms(result, counts="counts"):
    return result["sampled"][counts].get("3", 0.0)


PREFERRED, EXACT, KL = (COLUMNS[name] for name in ("preferred", "exact", "KL (nats)"))
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
        "sums outside 5..100": lambda r: r["outside"],
        "greedy": lambda r: r["greedy"]["exact"],
        "preferred: greedy": lambda r: r["greedy"]["preferred"],
    }
    return table("", columns, models_of(study))


def methods_table(study):
    """A row a method, with what it needs and the rate that was chosen."""
    columns = {"preferred": PREFERRED, "exact": EXACT} | PARTS_OF_KL
    rows = []
    for name, method in figures.methods_of(study).items():
        runs, rate = method["runs"], f"{method['settings']['lr']:g}"
        cells = [cell([value(run) for run in runs]) for value in columns.values()]
        rows.append([name, NEEDS[name], rate, *cells])
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
        of_policy = [cell([value(run) for run in method["runs"]]) for value in (PREFERRED, EXACT)]
        rows.append([name, rounded(z), cell(reached), rounded(mean(shares)), *of_policy])
    return markdown(
        ["", "z asked for", "z of pairs", "share asked for", "preferred", "exact"], rows
    )


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
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})", p


def differences_table(study):
    """Every method less the yardstick, with p-values corrected by Holm."""
    methods, metrics = methods_of(study), {EXCESS: PARTS_OF_KL[EXCESS], "preferred": PREFERRED}
    keys = list(itertools.product([name for name in methods if name != YARDSTICK], metrics))
    found = {key: paired(metrics[key[1]], methods[key[0]], methods[YARDSTICK]) for key in keys}
    corrected, largest = {}, 0.0
    for rank, key in enumerate(sorted(keys, key=lambda key: found[key][1])):
        largest = max(largest, min(1.0, found[key][1] * (len(keys) - rank)))
        corrected[key] = f"{largest:.3f}" if largest >= 0.001 else "< 0.001"
    cells = {key: [found[key][0], corrected[key]] for key in keys}
    rows = [[name, *cells[name, EXCESS], *cells[name, "preferred"]] for name, _ in keys[::2]]
    return markdown(["method", EXCESS, "p", "preferred", "p"], rows)


def looks_table(study):
    """The policy's own answers at the first steps of the classic pairs and at the last one."""
    rows = {}
    for looks in zip(*(run["looks"] for run in methods_of(study)["offline"])):
        rows[str(looks[0]["step"])] = looks
    steps = list(rows)
    rows = {step: rows[step] for step in [steps[0], *steps[4:7], steps[-1]]}
    columns = {key: lambda look, key=key: look[key] for key in ("preferred", "exact", "kl")}
    return table("step", columns, rows)


def tokens_table(study):
    """The next token at the end of rejected answers of two, four and five terms."""
    columns = {
        f"{name}, {k} terms": lambda r, name=name, k=k: r["next token"][k][name]
        for name in ("end", "right digit")
        for k in ("2", "4", "5")
    }
    return table("", columns, models_of(study))


def missed_table(study):
    """How the wrong answers of a policy miss the sum."""
    ways = ("go on after the exact sum", "overshoot", "stop short")
    columns = {way: lambda r, way=way: r["wrong"][way] for way in ways}
    return table("", {"wrong answers": lambda r: 1 - EXACT(r)} | columns, models_of(study))


# ---- the tables of the other parts -----------------------------------------------------------


def rewards_table(study):
    """What the reward model says of right and wrong answers: mean and deviation over answers."""
    kinds = [k for k in study["rlhf"]["runs"][0]["rewards"] if k != "optimum"]
    columns = {
        "mean reward": lambda of_seed: of_seed[0],
        "its deviation over answers": lambda of_seed: of_seed[1],
    }
    rows = {kind: [run["rewards"][kind] for run in study["rlhf"]["runs"]] for kind in kinds}
    return table("answer", columns, rows)


def optimum_table(study):
    """The optimum of the learned reward, as estimated, and where the runs end."""
    rlhf = study["rlhf"]
    columns = {key: lambda r, key=key: r[key] for key in ("preferred", "exact", "kl")}
    rows = {"optimum, estimated": [run["rewards"]["optimum"] for run in rlhf["runs"]]}
    for lr, runs in ((rlhf["settings"]["lr"], rlhf["runs"]), (rlhf["other lr"], rlhf["other"])):
        ends = [{"preferred": PREFERRED(run), "exact": EXACT(run), "kl": KL(run)} for run in runs]
        rows[f"RLHF, lr {lr:g}"] = ends
    return table("", columns, rows)


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
        cells = [cell([value(run) for run in runs]) for value in columns.values()]
        gain, _ = paired(EXACT, runs, of_variants["offline"])
        gain = "" if name == "offline" else gain
        rows.append([name, *cells, gain, cell(map(EXACT, others[name]))])
    header = ["variant", *columns, "exact, less offline", f"exact, lr {float(lr):g}"]
    return markdown(header, rows)


def collapse_table(study):
    """A row a change of one setting of the classic pairs."""
    columns = {key: lambda r, key=key: r[key] for key in ("preferred", "exact", "kl", "gap")}
    return table("changed", columns, study["collapse"])


def judge_table(study):
    """A row a setting with a noisy judge. Some were also trained twice as long, on one seed."""
    columns = {
        "optimum": lambda r: r["predicted"]["preferred"],
        "preferred": lambda r: r["preferred"],
        "exact": lambda r: r["exact"],
        "z of the optimum": lambda r: r["predicted"]["z"],
        "z, SFT's answers": lambda r: r["z"]["reference"],
        "z, own answers": lambda r: r["z parts"]["z"],
        "log-odds": lambda r: r["z parts"]["log-odds"],
        "+ KL, preferred": lambda r: r["z parts"]["preferred"],
        "− KL, others": lambda r: r["z parts"]["others"],
    }
    with_spread = ("preferred", "exact")
    longer = {name_of(entry): entry["runs"] for entry in study["judge"]["longer"]}
    rows = []
    for entry in study["judge"]["study"]:
        cells = []
        for name, value in columns.items():
            of_runs = [value(run) for run in entry["runs"]]
            cells.append(cell(of_runs if name in with_spread else [mean(of_runs)]))
        twice = longer.get(name_of(entry), [])
        cells.insert(3, " / ".join(cell([r[key] for r in twice]) for key in with_spread if twice))
        rows.append([*name_of(entry), f"{entry['settings']['lr']:g}", *cells])
    header = ["answers, loss", "β", "lr", *columns]
    header.insert(6, "both, twice the steps")
    return markdown(header, rows)


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
    "missed": missed_table,
    "rewards": rewards_table,
    "optimum": optimum_table,
    "interventions": interventions_table,
    "collapse": collapse_table,
    "judge": judge_table,
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
