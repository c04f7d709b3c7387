"""The README's numbers: Markdown tables, and figures in sentences, from JSON alone.

    python plots/tables.py     # or: make publish

Turns what plots/lesson.py leaves in runs/lesson into plots/published.json, the figures of it and
README.md between its markers: `<!-- models/dpo/exact .3f -->0.996<!-- end -->` holds one number of
published.json, `<!-- table models -->` a table. Without new runs of the judge that errs, what is
published of them stays.
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import InputError, is_exact, read_json, replacing, run_script  # noqa: E402
from plots import figures  # noqa: E402

PUBLISHED = ROOT / "plots" / "published.json"
README = ROOT / "README.md"
RUNS = Path("runs/lesson")  # where plots/lesson.py leaves them
MODELS = {"dpo_offline": "offline", "dpo_offline_nll": "offline + NLL", "dpo": "online"}
NEEDS = {
    "offline": "written answers",
    "online": "written answers, a judge",
    "reference": "a judge",
    "on-policy": "a judge",
}
METRICS = {  # name: of a model's result, as evaluate.py leaves it
    "preferred": lambda r: r["sampled"]["all"]["preferred"],
    "exact": lambda r: r["sampled"]["all"]["exact"],
    "exact, held-out sums": lambda r: r["sampled"]["held_out"]["exact"],
    "exact, largest sum": lambda r: r["exact_at_largest"],
    "exact, worst sum": lambda r: r["lowest_exact"][0],
    "exact, sums outside the range": lambda r: r["outside"]["exact"],
    "exact of three-term answers": lambda r: share_of_form(r["sampled"]["all"], "3"),
    "mean abs. error": lambda r: r["sampled"]["all"]["mae"],
    "parse rate": lambda r: r["sampled"]["all"]["parse_rate"],
    "preferred, greedy": lambda r: r["greedy"]["all"]["preferred"],
    "exact, greedy": lambda r: r["greedy"]["all"]["exact"],
    "gap to the entropy floor (nats)": lambda r: r.get("gap"),
    "KL from SFT (nats)": lambda r: r["kl"]["total"][0],
    "of it: what the preference needs": lambda r: r["kl"]["needed"][0],
    "of it: drift among preferred": lambda r: r["kl"]["preferred"][0],
    "of it: drift among all others": lambda r: r["kl"]["others"][0],
    "KL above the frontier (nats)": lambda r: r["kl"]["excess"][0],
    "training (s)": lambda r: r.get("seconds"),
}


def share_of_form(metrics, terms):
    given = metrics["counts"].get(terms, 0)
    return metrics["exact_counts"].get(terms, 0) / given if given else None


def over_seeds(values):
    """[mean, standard deviation, least, greatest] of one number of several runs; None without."""
    if None in values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return [statistics.mean(values), deviation, min(values), max(values)]


def summarise(runs):
    """{metric: over_seeds} of the results of one model or method."""
    return {metric: over_seeds([value(run) for run in runs]) for metric, value in METRICS.items()}


def publish(summary):
    """The content of published.json, but for its runs with a judge that errs."""
    runs = {"sft": summary["sft"]}
    runs |= {model: summary["methods"][name]["runs"] for model, name in MODELS.items()}
    methods = {}
    for name, method in summary["methods"].items():
        kl, share = METRICS["KL from SFT (nats)"], METRICS["preferred"]
        methods[name] = {
            "flags": method["flags"],
            "rates": method["rates"],
            "needs": NEEDS[re.search(r"--pairs (\S+)", method["flags"])[1]],
            "points": [[kl(run), share(run)] for run in method["runs"]],
            **summarise(method["runs"]),
        }
    return {
        "seeds": len(summary["sft"]),
        "models": {name: summarise(results) for name, results in runs.items()},
        "answers": {name: results[0]["answers"] for name, results in runs.items()},
        "methods": methods,
        "extra": {name: summarise(results) for name, results in summary["extra"].items()},
        "frontier": summary["frontier"],
        "tokens": {
            model: {
                kind: over_seeds([run["tokens"][kind] for run in results])
                for kind in results[0]["tokens"]
            }
            for model, results in runs.items()
            if model != "sft"
        },
    }


def publish_judge(records):
    """Those runs: one entry for all seeds of a setting."""
    settings = {}
    for run in records:
        settings.setdefault((run["kind"], run["flags"]), []).append(run)
    return [
        runs[0] | {key: over_seeds([run[key] for run in runs]) for key in JUDGE_COLUMNS}
        for runs in settings.values()
    ]


# ---- Markdown --------------------------------------------------------------------------------

METHOD_COLUMNS = {  # heading: metric
    "preferred": "preferred",
    "exact": "exact",
    "exact of three-term answers": "exact of three-term answers",
    "mean abs. error": "mean abs. error",
    "needed": "of it: what the preference needs",
    "drift, preferred": "of it: drift among preferred",
    "drift, others": "of it: drift among all others",
    "above the frontier": "KL above the frontier (nats)",
    "seconds": "training (s)",
}

JUDGE_COLUMNS = ("share predicted", "preferred", "exact", "KL predicted", "KL")


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(summary):
    """A mean and, of several runs, its standard deviation: "0.987 ± 0.002"."""
    if summary is None:
        return ""
    mean, deviation = summary[:2]
    digits = 3 if abs(mean) < 10 else 1
    mean = round(mean, digits) + 0.0  # no negative zero
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def models_table(content):
    """One row a metric, one column a model."""
    names = figures.in_order(content["models"])
    columns = [content["models"][name] for name in names]
    rows = [[metric, *(cell(column[metric]) for column in columns)] for metric in METRICS]
    return markdown(["", *(figures.label_and_colour(name, names)[0] for name in names)], rows)


def published_models():
    """That table of published.json, or None where nothing is published."""
    if not PUBLISHED.exists():
        return None
    try:
        return models_table(read_json(PUBLISHED))
    except (InputError, AttributeError, LookupError, TypeError, ValueError):
        raise InputError(f"{PUBLISHED} is not of this project; make publish writes it") from None


def answers_table(content):
    rows = [
        [figures.MODELS[name][0], *(f"`{a}`" + ("" if is_exact(a) else " ✗") for a in answers)]
        for name, answers in content["answers"].items()
    ]
    return markdown(["", "three answers", "", ""], rows)


def methods_table(content):
    """One row a method, with the rate it was given and what it needs."""
    rows = []
    for name, method in content["methods"].items():
        flags, rate = method["flags"].split(" --lr ")
        cells = [cell(method[metric]) for metric in METHOD_COLUMNS.values()]
        rows.append([name, f"`{flags}`", rate, method["needs"], *cells])
    return markdown(["method", "flags", "lr", "needs", *METHOD_COLUMNS], rows)


def tokens_table(content):
    """Mean log pi - log pi_ref of rejected answers, by kind of token."""
    kinds = list(next(iter(content["tokens"].values())))
    rows = [
        [figures.MODELS[name][0], *(cell(nats[kind]) for kind in kinds)]
        for name, nats in content["tokens"].items()
    ]
    return markdown(["rejected answers, nats", *kinds], rows)


def judge_table(content):
    """One row a run with the judge that errs: what theory predicts, and what came out."""
    rows = []
    for run in content["judge"]:
        setting = re.search(r"--steps (\S+) --lr (\S+)", run["flags"]).groups()
        cells = [cell(run[key]) for key in JUDGE_COLUMNS]
        rows.append([run["source"], f"{run['beta']:g}", *setting, run["kind"], *cells])
    return markdown(["pairs", "β", "steps", "lr", "", *JUDGE_COLUMNS], rows)


TABLES = {
    "answers": answers_table,
    "models": models_table,
    "methods": methods_table,
    "tokens": tokens_table,
    "judge": judge_table,
}


def fill(text, content):
    """A README with every table and number between its markers written anew."""

    def number(found):
        value = content
        for key in found[1].split("/"):
            value = value[int(key)] if isinstance(value, list) else value[key]
        value = value[0] if isinstance(value, list) else value  # the mean of a summary
        return f"<!-- {found[1]} {found[2]} -->{value:{found[2]}}<!-- end -->"

    def table(found):
        return f"<!-- table {found[1]} -->\n{TABLES[found[1]](content)}\n<!-- end -->"

    for name in TABLES:
        if f"<!-- table {name} -->" not in text:
            raise InputError(f"the README has no place for the table {name}: <!-- table {name} -->")
    text = re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
    return re.sub(r"<!-- ([^>]+) (\.\d[f%]) -->[^<]*<!-- end -->", number, text)


def main():
    if not (RUNS / "summary.json").exists():
        raise InputError("there is nothing to publish yet; make lesson trains it")
    content = publish(read_json(RUNS / "summary.json"))
    if (RUNS / "judge.json").exists():
        content["judge"] = publish_judge(read_json(RUNS / "judge.json"))
    else:
        content["judge"] = read_json(PUBLISHED)["judge"]
    figures.draw_published(content, PUBLISHED.parent)
    text = fill(README.read_text(encoding="utf-8"), content)
    with replacing(PUBLISHED, README) as (published, readme):
        published.write(json.dumps(content, indent=1).encode() + b"\n")
        readme.write(text.encode())


if __name__ == "__main__":
    run_script(main)
