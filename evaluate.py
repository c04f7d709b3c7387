"""What the checkpoints answer, measured and drawn.

    python evaluate.py                       # every checkpoint in runs/: tables and figures in plots/
    python evaluate.py --ask 100 57          # what each of them answers to 100= and 57=

Every model answers every sum, greedily once and sampled many times; an answer counts as exact if it
parses and its terms add up. Left out on purpose: anything that trains.
"""

import glob
import json
import os
import platform
from collections import Counter

import matplotlib
import numpy as np
import torch

from data import (
    MIN_SUM, TERM_COUNTS, ArgumentParser, InputError, collate, decode, held_out_sums, integer_in,
    nats_per_equation, parse, random_equations, replacing, run_script, seen_sums,
)
from model import completion_logps, find_device, generate, load_checkpoint, log_path
from plots import figures

CHUNK = 10_000  # sequences at a time
GAP_SEED, GAP_SIZE = 1_000_004, 20_000  # the equations on which the gap to the entropy floor is measured


def parse_args(argv=None):
    parser = ArgumentParser(description="Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="models to evaluate (all of runs/*.pt)")
    add("--sft", default="runs/sft.pt", help="the reference that KL is measured from (%(default)s)")
    add("--samples", type=integer_in(1, 10**6), default=100, help="sampled answers of every sum (%(default)s)")
    add("--ask", nargs="+", type=int, metavar="N", help="only print what each checkpoint answers to N=")
    add("--plots-dir", default="plots", help="folder of figures and results.json (%(default)s)")
    add("--seed", type=integer_in(0, 2**32), default=0, help="of the samples (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    return parser.parse_args(argv)


# ---- metrics ---------------------------------------------------------------------------------


def measure(equations, preferred_terms):
    """Metrics of a list of answers such as "9=3+3+3".

    parse_rate, exact, preferred and the counts, of exact answers too, are shares of all answers; mae is the mean
    |N - sum of terms| of those that parse, None if none does.
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
    """KL(model || reference) in nats and its standard error, from completions sampled from model."""
    with torch.no_grad():
        log_ratios = torch.cat([
            completion_logps(model, *chunk) - completion_logps(reference, *chunk) for chunk in chunks
        ])
    return log_ratios.mean().item(), (log_ratios.std() / len(log_ratios) ** 0.5).item()


def gap_to_floor(model, max_sum):
    """Nats per equation by which the model's loss exceeds the entropy floor, on the seen sums."""
    examples = random_equations(np.random.default_rng(GAP_SEED), GAP_SIZE, np.array(seen_sums(max_sum)))
    device = model.head.weight.device
    with torch.no_grad():
        losses = torch.cat([
            -completion_logps(model, *(x.to(device) for x in collate(examples[start : start + CHUNK])))
            for start in range(0, GAP_SIZE, CHUNK)
        ])
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


# ---- tables ----------------------------------------------------------------------------------


def results_table(models):
    """The table of the README, in Markdown, from the "models" of results.json."""
    lines = [
        "| model | answers | parse rate | mean abs. error | exact | exact, held out | preferred | KL (nats) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in models.items():
        for decoding in ("greedy", "sampled"):
            metrics = result[decoding]["all"]
            mae = "none parse" if metrics["mae"] is None else f"{metrics['mae']:.3f}"
            kl = f"{result['kl']:.2f} ± {result['kl_se']:.2f}" if decoding == "sampled" else ""
            lines.append(
                f"| {name} | {decoding} | {metrics['parse_rate']:.3f} | {mae} | {metrics['exact']:.3f} "
                f"| {result[decoding]['held_out']['exact']:.3f} | {metrics['preferred']:.3f} | {kl} |"
            )
    return "\n".join(lines)


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
    print(f"\n{name}: four of {len(equations)} sampled answers, and {len(some)} of the {len(mistakes)} mistakes")
    for left in picked + some:
        print("  ", mark(left))


def ask(models, sums, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for name, model in models.items():
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            greedy, _ = answer(model, [n], greedy=True)
            sampled, _ = answer(model, [n] * 3, generator=generator)
            print(f"{name:>12}  greedy {mark(greedy[0]):<28} sampled " + "   ".join(map(mark, sampled)))


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


def write_json(path, content):
    with replacing(path) as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def main(args):
    # ---- models
    device = find_device(args.device)
    paths = args.checkpoints or sorted(glob.glob("runs/*.pt"), key=by_stage)
    if not paths:
        raise InputError("there is no checkpoint in runs/; train_sft.py writes the first")
    loaded = {name_of(path): load_checkpoint(path, device) for path in paths}
    if len(loaded) < len(paths):
        raise InputError("two checkpoints have the same file name, which would be their name in tables")
    models = {name: model for name, (model, _) in loaded.items()}

    max_sums = {model.config.max_sum for model in models.values()}
    preferred = {args["preferred_terms"] for _, args in loaded.values() if "preferred_terms" in args} or {3}
    if len(max_sums) > 1 or len(preferred) > 1:
        raise InputError("the checkpoints differ in --max-sum or --preferred-terms: evaluate them apart")
    max_sum, preferred_terms = max_sums.pop(), preferred.pop()

    if args.ask:
        for n in args.ask:
            if not MIN_SUM <= n <= max_sum:
                raise InputError(f"--ask {n} is out of range; these models know sums from {MIN_SUM} to {max_sum}")
        return ask(models, args.ask, args.seed)

    # ---- metrics
    reference, _ = load_checkpoint(args.sft, device)
    if reference.config.max_sum != max_sum:
        raise InputError(f"{args.sft} has another --max-sum than the checkpoints: it is not their reference")
    results, logs = {}, {}
    rng = np.random.default_rng(args.seed)
    for path, (name, model) in zip(paths, models.items()):
        results[name], equations = evaluate(model, reference, max_sum, preferred_terms, args.samples, args.seed)
        logs[name] = read_log(path)
        if logs[name]:
            last = logs[name][-1]
            results[name] |= {key: last[key] for key in ("seconds", "equations", "pairs") if key in last}
        results[name]["seed"] = loaded[name][1].get("seed")
        if "pairs" not in loaded[name][1]:  # an SFT model
            results[name]["gap"] = gap_to_floor(model, max_sum)
        print_examples(name, equations, rng)
    results = {
        "models": results,
        "task": {"max_sum": max_sum, "preferred_terms": preferred_terms, "samples": args.samples, "seed": args.seed},
        "environment": {
            "python": platform.python_version(),
            **{package.__name__: package.__version__ for package in (torch, np, matplotlib)},
            "cores": os.cpu_count(),
        },
    }
    print(f"\npreferred: answers of {preferred_terms} terms; sampled: {args.samples} answers of each of "
          f"{max_sum - MIN_SUM + 1} sums")
    print(results_table(results["models"]))

    # ---- files
    write_json(os.path.join(args.plots_dir, "results.json"), results)
    write_json(os.path.join(args.plots_dir, "logs.json"), logs)
    figures.draw_all(results, logs, args.plots_dir)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
