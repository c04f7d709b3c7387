"""What the checkpoints answer, measured and drawn.

    python evaluate.py                # every checkpoint in runs/: tables and figures in plots/
    python evaluate.py --ask 100 57   # what each of them answers to 100= and 57=

Every model answers every sum, greedily once and sampled many times; an answer counts as exact if it
parses and its terms add up. Left out on purpose: anything that trains.
"""

import functools
import glob
import json
import os
import platform
import re
from collections import Counter

import matplotlib
import numpy as np
import torch

from data import (
    MIN_SUM,
    ArgumentParser,
    InputError,
    collate,
    decode,
    held_out_sums,
    integer_in,
    is_preferred,
    nats_per_equation,
    parse,
    random_equations,
    random_pairs,
    replacing,
    run_script,
    seen_sums,
)
from model import completion_logps, find_device, generate, load_checkpoint, log_path, token_logps
from plots import figures

CHUNK = 10_000  # sequences at a time
TOKEN_SEED = 1_000_003
GAP_SEED = 1_000_004  # of the equations on which the gap to the entropy floor is measured
GAP_SIZE = 20_000
PASSED = 0.97  # the preferred share at which a run counts as having learned the preference


def parse_args(argv=None):
    parser = ArgumentParser(description="Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="models to evaluate (all of runs/*.pt)"
    )
    add("--sft", default="runs/sft.pt", help="the reference that KL is measured from (%(default)s)")
    add(
        "--samples",
        type=integer_in(1, 10**6),
        default=100,
        help="sampled answers of every sum (%(default)s)",
    )
    add(
        "--ask",
        nargs="+",
        type=int,
        metavar="N",
        help="only print what each checkpoint answers to N=",
    )
    add("--plots-dir", default="plots", help="folder of figures and results.json (%(default)s)")
    add(
        "--replot",
        action="store_true",
        help="only redraw the figures, from the JSON files in --plots-dir",
    )
    add(
        "--seeds",
        nargs="+",
        metavar="FILE",
        help="results.json of runs with other seeds, for means and deviations",
    )
    add(
        "--readme",
        metavar="FILE",
        help="write the tables between their markers in this Markdown file",
    )
    add("--seed", type=integer_in(0, 2**32), default=0, help="of the samples (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    return parser.parse_args(argv)


# ---- metrics ---------------------------------------------------------------------------------


def measure(equations, preferred_terms):
    """Metrics of a list of answers such as "9=3+3+3".

    parse_rate, exact, preferred and the counts by number of terms (exact_counts: right ones alone)
    are shares of all answers; mae is the mean |N - sum of terms| of those that parse, or None.
    """
    parsed = [result for result in map(parse, equations) if result is not None]
    errors = [abs(n - sum(terms)) for n, terms in parsed]
    counts = Counter(len(terms) for _, terms in parsed)
    exact_counts = Counter(len(terms) for n, terms in parsed if n == sum(terms))
    n = len(equations)
    return {
        "parse_rate": len(parsed) / n,
        "mae": sum(errors) / len(errors) if errors else None,
        "exact": errors.count(0) / n,
        "preferred": counts[preferred_terms] / n,
        "counts": {str(k): counts[k] / n for k in sorted(counts)},
        "exact_counts": {str(k): exact_counts[k] / n for k in sorted(exact_counts)},
        "n": n,
    }


def answer(model, sums, greedy=False, generator=None):
    """The answers to each of `sums` as text, and their tokens and completion masks in chunks."""
    equations, chunks = [], []
    for start in range(0, len(sums), CHUNK):
        prompts = [f"{n}=" for n in sums[start : start + CHUNK]]
        tokens, completion_mask = generate(model, prompts, greedy, generator)
        equations += [decode(row) for row in tokens.tolist()]
        chunks.append((tokens, completion_mask))
    return equations, chunks


def kl_from(reference, model, chunks):
    """KL(model || reference) in nats and its standard error, from samples of the model."""
    with torch.no_grad():
        log_ratios = torch.cat(
            [
                completion_logps(model, *chunk) - completion_logps(reference, *chunk)
                for chunk in chunks
            ]
        )
    return log_ratios.mean().item(), (log_ratios.std() / len(log_ratios) ** 0.5).item()


# ---- theory: the oracle ----------------------------------------------------------------------


def oracle(reference, max_sum, preferred_terms, samples, generator):
    """The ideal that DPO should reach, by rejection sampling from the reference.

    Of all policies that give none but preferred answers the nearest to the reference is the
    reference conditioned on them (the limit of arXiv 2305.18290, eq. 4, for a reward of -inf on all
    else); its KL is the mean over N of -log p_ref(preferred | N). Returns that least KL in nats,
    its standard error, and the `first_terms` of two independent draws of the oracle. The KL is None
    where some sum got no preferred answer in 2 * `samples` tries.
    """
    sums = np.repeat(np.arange(MIN_SUM, max_sum + 1), samples)
    draws = [answer(reference, sums, generator=generator)[0] for _ in range(2)]
    preferred = np.array([[is_preferred(text, preferred_terms) for text in draw] for draw in draws])
    p = preferred.reshape(2, -1, samples).mean((0, 2))  # (sums,)
    if p.min() > 0:
        least_kl = float(-np.log(p).mean())
        variances = (1 - p) / (p * 2 * samples)  # of each log p, by the delta method
        error = float(np.sqrt(variances.sum()) / len(p))
    else:
        least_kl = error = None
    return least_kl, error, [first_terms(draw, max_sum, preferred_terms) for draw in draws]


def first_terms(equations, max_sum, count=None):
    """Shares of the first terms 0, 1, 2, ... of right answers of `count` terms, or of any number.

    All sums weigh alike. None if there is no such answer.
    """
    table = np.zeros((max_sum + 1, max_sum + 1))  # (sum, first term)
    for n, terms in filter(None, map(parse, equations)):
        if n == sum(terms) and count in (None, len(terms)):
            table[n, terms[0]] += 1
    answered = table[table.sum(1) > 0]
    if not len(answered):
        return None
    return (answered / answered.sum(1, keepdims=True)).mean(0).tolist()


def one_digit(first_term_shares):
    """The share of first terms of one digit."""
    return None if first_term_shares is None else sum(first_term_shares[:10])


def kl_on_passing(log):
    """KL in nats of the policy in a DPO log when its own preferred share first reached PASSED."""
    return next((r["own/kl"] for r in log if r.get("own/preferred", 0) >= PASSED), None)


def over(kl, least_kl):
    return kl / least_kl if kl is not None and least_kl else None


def total_variation(one, other):
    """Half the sum of absolute differences of two distributions; None if either is missing."""
    return (
        None if one is None or other is None else float(np.abs(np.subtract(one, other)).sum() / 2)
    )


# ---- which token pays ------------------------------------------------------------------------

PAIRS_LOOKED_AT = 2000
TOKEN_KINDS = ("end token", "plus signs", "last term", "other digits")


def token_kinds(completion):
    """The kind of every token of a completion and its end token, as indices of TOKEN_KINDS."""
    last_term = completion.rfind("+") + 1
    kinds = [
        1 if character == "+" else 2 if i >= last_term else 3
        for i, character in enumerate(completion)
    ]
    return kinds + [0]


def token_logratios(model, reference, examples):
    """log pi - log pi_ref of every completion token: a list of arrays, nats."""
    tokens, completion_mask = (x.to(model.head.weight.device) for x in collate(examples))
    with torch.no_grad():
        difference = token_logps(model, tokens, completion_mask) - token_logps(
            reference, tokens, completion_mask
        )
    return [row[mask].cpu().numpy() for row, mask in zip(difference, completion_mask[:, 1:])]


def who_pays(models, reference, max_sum, preferred_terms):
    """Where in chosen and rejected answers each model differs from the reference.

    Of `PAIRS_LOOKED_AT` pairs of the generator: mean nats per answer by kind of token; and token by
    token for the first few of sums of two digits.
    """
    pairs = random_pairs(
        np.random.default_rng(TOKEN_SEED),
        PAIRS_LOOKED_AT,
        np.array(seen_sums(max_sum)),
        preferred_terms,
    )
    result = {"kinds": list(TOKEN_KINDS), "models": {}, "strings": []}
    shown = [pair for pair in pairs if len(pair[0]) == 3][:3]
    strings = [
        (prompt, text, side)
        for prompt, *texts in shown
        for side, text in zip(("chosen", "rejected"), texts)
    ]
    strings.sort(key=lambda string: string[2])
    for name, model in models.items():
        result["models"][name] = {}
        for side, column in (("chosen", 1), ("rejected", 2)):
            examples = [(pair[0], pair[column]) for pair in pairs]
            by_kind = np.zeros(len(TOKEN_KINDS))
            for (_, completion), row in zip(examples, token_logratios(model, reference, examples)):
                np.add.at(by_kind, token_kinds(completion), row)
            result["models"][name][side] = (by_kind / len(pairs)).tolist()
    for prompt, text, side in strings:
        rows = {
            name: token_logratios(model, reference, [(prompt, text)])[0].tolist()
            for name, model in models.items()
        }
        result["strings"].append({"prompt": prompt, "text": text, "side": side, "nats": rows})
    return result


def gap_to_floor(model, max_sum):
    """Nats per equation by which the model's loss exceeds the entropy floor, on the seen sums."""
    examples = random_equations(
        np.random.default_rng(GAP_SEED), GAP_SIZE, np.array(seen_sums(max_sum))
    )
    device = model.head.weight.device
    with torch.no_grad():
        losses = torch.cat(
            [
                -completion_logps(
                    model, *(x.to(device) for x in collate(examples[start : start + CHUNK]))
                )
                for start in range(0, GAP_SIZE, CHUNK)
            ]
        )
    return losses.mean().item() - nats_per_equation(examples)


def evaluate(model, reference, max_sum, preferred_terms, samples, seed):
    """What results.json says of one model's answers, and some of its sampled answers."""
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    result = {}
    for decoding, per_sum in (("greedy", 1), ("sampled", samples)):
        sums = np.repeat(np.arange(MIN_SUM, max_sum + 1), per_sum)
        equations, chunks = answer(model, sums, decoding == "greedy", generator)
        held_out = np.isin(sums, held_out_sums(max_sum))
        splits = {"all": held_out | True, "seen": ~held_out, "held_out": held_out}
        result[decoding] = {
            split: measure([equations[i] for i in rows.nonzero()[0]], preferred_terms)
            for split, rows in splits.items()
        }
    result["kl"], result["kl_se"] = kl_from(reference, model, chunks)
    return result, equations


# ---- tables: Markdown, made from results.json alone ----------------------------------------------


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value, digits=3):
    return "none" if value is None else f"{value:.{digits}f}"


def results_table(results):
    rows = []
    for name, result in results["models"].items():
        for decoding in ("greedy", "sampled"):
            metrics, held_out = result[decoding]["all"], result[decoding]["held_out"]
            rows.append(
                [
                    name,
                    decoding,
                    number(metrics["parse_rate"]),
                    number(metrics["mae"]),
                    number(metrics["exact"]),
                    number(held_out["exact"]),
                    number(metrics["preferred"]),
                    f"{result['kl']:.2f} ± {result['kl_se']:.2f}" if decoding == "sampled" else "",
                ]
            )
    return markdown(
        [
            "model",
            "answers",
            "parse rate",
            "mean abs. error",
            "exact",
            "exact, held-out sums",
            f"{results['task']['preferred_terms']} terms",
            "KL (nats)",
        ],
        rows,
    )


def oracle_table(results):
    ideal = results["oracle"]

    rows = [
        [
            "oracle",
            "1.000",
            "1.000",
            number(ideal["kl"], 2),
            "1.00",
            "",
            f"{number(ideal['noise'])} (noise)",
            number(one_digit(ideal["first_terms"])),
        ]
    ]
    for name, result in results["models"].items():
        metrics = result["sampled"]["all"]
        rows.append(
            [
                name,
                number(metrics["preferred"]),
                number(metrics["exact"]),
                number(result["kl"], 2),
                number(result["kl_over_least"], 2),
                number(result.get("kl_over_least_on_passing"), 2),
                number(result.get("total_variation")),
                number(one_digit(result["first_terms"])),
            ]
        )
    return markdown(
        [
            "model",
            f"{results['task']['preferred_terms']} terms",
            "exact",
            "KL (nats)",
            "KL / least KL",
            f"KL / least KL on first passing {PASSED:.0%}",
            "first term: distance to the oracle",
            "first term: one digit",
        ],
        rows,
    )


def recipes_table(results):
    """The models of the same beta by where their pairs come from."""
    rows = []
    for result in results["models"].values():
        if "pairs" in result and result["beta"] == results["models"].get("dpo", result)["beta"]:
            metrics = result["sampled"]["all"]
            rows.append(
                [
                    f"`--pairs {result['pairs']}`",
                    f"{result['lr']:g}",
                    str(result["steps"]),
                    number(metrics["preferred"]),
                    number(metrics["exact"]),
                    number(metrics["mae"]),
                    number(result["kl"], 2),
                ]
            )
    return markdown(
        [
            "pairs",
            "lr",
            "steps",
            f"{results['task']['preferred_terms']} terms",
            "exact",
            "mean abs. error",
            "KL (nats)",
        ],
        rows,
    )


def tokens_table(results):
    tokens, rows = results["tokens"], []
    for name, sides in tokens["models"].items():
        for side, nats in sides.items():
            total = sum(nats)
            # Of a total near zero a share says nothing.
            cells = [f"{x:+.2f}" + (f" ({x / total:.0%})" if abs(total) >= 1 else "") for x in nats]
            rows.append([name, side, f"{total:+.1f}", *cells])
    return markdown(["model", "side", "log π - log π_ref", *tokens["kinds"]], rows)


def seeds_table(results):
    """One row a metric, one column a model: mean and standard deviation over the seeds."""
    models, runs = results["seeds"]["models"], results["seeds"]["n"]
    rows = [
        [
            metric,
            *(over_seeds_cell(metrics.get(metric), runs) for metrics in models.values()),
        ]
        for metric in SEED_METRICS
    ]
    return markdown([f"over {runs} seeds", *models], rows)


def over_seeds_cell(summary, runs):
    if summary is None:
        return ""
    mean, deviation, known = summary
    return f"{mean:.3f} ± {deviation:.3f}" + (f" (of {known})" if known < runs else "")


def tables(results, names):
    """Every table by its marker in the README; all but the recipes show just the models `names`."""
    shown = results | {
        "models": {name: results["models"][name] for name in names},
        "tokens": results["tokens"]
        | {"models": {k: v for k, v in results["tokens"]["models"].items() if k in names}},
    }
    found = {"results": results_table(shown), "oracle": oracle_table(shown)}
    if results["tokens"]["models"]:
        found |= {"recipes": recipes_table(results), "tokens": tokens_table(shown)}
    if "seeds" in results:
        found["seeds"] = seeds_table(results)
    return found


def readme_tables(results):
    return tables(results, [name for name in figures.MODELS if name in results["models"]])


def write_tables(readme, results):
    """Puts every table between its markers, <!-- name --> and <!-- end name -->, in a README."""
    try:
        with open(readme, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"cannot read {readme}: {error}") from None
    for name, table in readme_tables(results).items():
        text = re.sub(
            f"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
            lambda found: f"{found[1]}{table}\n{found[2]}",
            text,
            flags=re.DOTALL,
        )
    with replacing(readme) as file:
        file.write(text)


SEED_METRICS = {  # row: where in a model's results
    "gap to the entropy floor (nats)": ("gap",),
    "exact": ("sampled", "all", "exact"),
    "exact, held-out sums": ("sampled", "held_out", "exact"),
    "preferred": ("sampled", "all", "preferred"),
    "mean abs. error": ("sampled", "all", "mae"),
    "exact, greedy": ("greedy", "all", "exact"),
    "preferred, greedy": ("greedy", "all", "preferred"),
    "KL (nats)": ("kl",),
    "KL / least KL": ("kl_over_least",),
    f"KL / least KL on first passing {PASSED:.0%}": ("kl_over_least_on_passing",),
    "first term: distance to the oracle": ("total_variation",),
}


def over_seeds(runs):
    """Mean, standard deviation and number of the values of each metric over several seeds.

    A seed may lack one: without a least KL, see `oracle`, there is no ratio to it.
    """
    models = {}
    for name in runs[0]["models"]:
        if all(name in run["models"] for run in runs):
            models[name] = {}
            for metric, path in SEED_METRICS.items():
                values = [functools.reduce(dict.get, path, run["models"][name]) for run in runs]
                known = [value for value in values if value is not None]
                if len(known) > 1:
                    models[name][metric] = [
                        float(np.mean(known)),
                        float(np.std(known, ddof=1)),
                        len(known),
                    ]
    return {"n": len(runs), "models": models}


# ---- answers to look at ----------------------------------------------------------------------


def mark(equation):
    """An answer with a mark: right, wrong (and by how much), or not of the form asked for."""
    parsed = parse(equation)
    if parsed is None:
        return f"✗ {equation} (not an equation)"
    error = sum(parsed[1]) - parsed[0]
    return f"✗ {equation} (off by {error:+d})" if error else f"✓ {equation}"


def print_examples(name, equations, rng):
    """Four answers picked at random, and up to four mistakes."""
    picked = list(rng.choice(equations, 4))
    mistakes = [equation for equation in equations if mark(equation).startswith("✗")]
    some = list(rng.permutation(mistakes)[:4])
    print(
        f"\n{name}: four of {len(equations)} sampled answers, "
        f"and {len(some)} of the {len(mistakes)} mistakes"
    )
    for left in picked + some:
        print("  ", mark(left))


def ask(models, sums, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for name, model in models.items():
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            greedy, _ = answer(model, [n], greedy=True)
            sampled, _ = answer(model, [n] * 3, generator=generator)
            print(
                f"{name:>12}  greedy {mark(greedy[0]):<28} sampled "
                + "   ".join(map(mark, sampled))
            )


# ---- the script ------------------------------------------------------------------------------


def name_of(checkpoint_path):
    return os.path.splitext(os.path.basename(checkpoint_path))[0]


def by_stage(checkpoint_path):
    """Sorting key: the models of the README in its order, then all others by name."""
    name = name_of(checkpoint_path)
    stages = list(figures.MODELS)
    return stages.index(name) if name in stages else len(stages), name


def read_log(checkpoint_path):
    """The records of the log beside a checkpoint; none if it has no log."""
    path = log_path(checkpoint_path)
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the log {path}: {error}") from None


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def redraw(plots_dir):
    """Every figure again, from the JSON files of an earlier evaluation."""
    results, logs = (
        read_json(os.path.join(plots_dir, name)) for name in ("results.json", "logs.json")
    )
    figures.draw_all(results, logs, plots_dir)


def write_json(path, content):
    with replacing(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def main(args):
    if args.replot:
        return redraw(args.plots_dir)

    # ---- models
    device = find_device(args.device)
    paths = args.checkpoints or sorted(glob.glob("runs/*.pt"), key=by_stage)
    if not paths:
        raise InputError("there is no checkpoint in runs/; train_sft.py writes the first")
    loaded = {name_of(path): load_checkpoint(path, device) for path in paths}
    if len(loaded) < len(paths):
        raise InputError(
            "two checkpoints have the same file name, which would be their name in tables"
        )
    models = {name: model for name, (model, _) in loaded.items()}
    max_sums = {model.config.max_sum for model in models.values()}
    preferred = {
        saved["preferred_terms"] for _, saved in loaded.values() if "preferred_terms" in saved
    } or {3}
    if len(max_sums) > 1 or len(preferred) > 1:
        raise InputError(
            "the checkpoints differ in --max-sum or --preferred-terms: evaluate them apart"
        )
    max_sum, preferred_terms = max_sums.pop(), preferred.pop()

    if args.ask:
        for n in args.ask:
            if not MIN_SUM <= n <= max_sum:
                raise InputError(
                    f"--ask {n} is out of range; these models know sums from {MIN_SUM} to {max_sum}"
                )
        return ask(models, args.ask, args.seed)

    # ---- metrics
    reference, _ = load_checkpoint(args.sft, device)
    if reference.config.max_sum != max_sum:
        raise InputError(
            f"{args.sft} has another --max-sum than the checkpoints: it is not their reference"
        )
    generator = torch.Generator(device).manual_seed(args.seed)
    least_kl, least_kl_se, (draw, second_draw) = oracle(
        reference, max_sum, preferred_terms, 4 * args.samples, generator
    )
    results = {
        "task": {
            "max_sum": max_sum,
            "preferred_terms": preferred_terms,
            "samples": args.samples,
            "seed": args.seed,
        },
        "models": {},
        "oracle": {
            "kl": least_kl,
            "kl_se": least_kl_se,
            "noise": total_variation(draw, second_draw),
            "first_terms": draw,
        },
        "tokens": who_pays(
            {name: model for name, model in models.items() if "preferred_terms" in loaded[name][1]},
            reference,
            max_sum,
            preferred_terms,
        ),
        "environment": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, np, matplotlib)},
            "cores": os.cpu_count(),
        },
    }
    logs = {}
    for path, (name, model) in zip(paths, models.items()):
        result, equations = evaluate(
            model, reference, max_sum, preferred_terms, args.samples, args.seed
        )
        _, saved = loaded[name]
        result["kl_over_least"] = over(result["kl"], least_kl)
        result |= {
            key: saved.get(key) for key in ("seed", "pairs", "beta", "lr", "steps") if key in saved
        }
        logs[name] = read_log(path)
        if logs[name]:
            last = logs[name][-1]
            result |= {"seconds": last["seconds"], "seen": last.get("equations", last.get("pairs"))}
        if "preferred_terms" not in saved:  # an SFT model
            result["gap"] = gap_to_floor(model, max_sum)
            result["first_terms"] = first_terms(equations, max_sum)
        else:
            result["first_terms"] = first_terms(equations, max_sum, preferred_terms)
            result["total_variation"] = total_variation(result["first_terms"], draw)
            result["kl_over_least_on_passing"] = over(kl_on_passing(logs[name]), least_kl)
        results["models"][name] = result
        print_examples(name, equations, np.random.default_rng(args.seed))
    if args.seeds:
        results["seeds"] = over_seeds([results] + [read_json(path) for path in args.seeds])

    # ---- tables, figures
    for title, table in tables(results, results["models"]).items():
        print(f"\n{title}\n{table}")
    write_json(os.path.join(args.plots_dir, "results.json"), results)
    write_json(os.path.join(args.plots_dir, "logs.json"), logs)
    figures.draw_all(results, logs, args.plots_dir)
    if args.readme:
        write_tables(args.readme, results)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
