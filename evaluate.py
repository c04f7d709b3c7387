"""What the models answer: mean absolute sum error, parse rate, histograms of the number of terms.

    python evaluate.py                # every checkpoint in runs/: a table, results.json and figures
    python evaluate.py --ask 100,57   # only what each of them answers to 100= and 57=

Every model answers every sum, once greedily and many times by sampling. The KL from the SFT model
is the mean of log pi - log pi_ref over a model's own sampled answers. A model is named after what
trained it, such as "offline + KL". plots/study/ repeats all of this over seeds.
"""

import glob
import json
import os
import random

import torch

from data import DEVICES, MIN_SUM, check_writable, held_out_sums, is_exact
from data import make_parser, mark, measure, number, run_script, shown_sums, write_file
from model import answer, fingerprint, load_checkpoint, logratios_of
from plots import figures


def parse_args(argv=None):
    parser = make_parser("Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="models, or runs/*.pt")
    add("--sft", default="runs/sft.pt", help="the SFT model, which is the reference")
    add("--samples", type=number(int, 1), default=100, help="sampled answers to every sum")
    add("--ask", type=list_of_sums, metavar="N,N,...", help="only print answers to these sums")
    add("--plots-dir", default="plots", help="folder of results.json and the figures")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    return parser.parse_args(argv)


def list_of_sums(text):
    return [number(int, 1, 999)(n) for n in text.split(",")]


# ---- which models ----------------------------------------------------------------------------


def load_models(args):
    """{path: (model, saved args, log)}, the SFT model first, then in the order of training."""
    paths = [args.sft]
    for path in args.checkpoints or sorted(glob.glob("runs/*.pt"), key=os.path.getmtime):
        if os.path.realpath(path) not in map(os.path.realpath, paths):
            paths.append(path)
    return {path: load_checkpoint(path, args.device) for path in paths}


def comparable(loaded):
    """The models that fit the first, which is the reference, and the number of terms to prefer."""
    (sft, (reference, _, _)), *_ = loaded.items()
    known, included, terms = fingerprint(reference), {}, None
    for path, (model, saved_args, log) in loaded.items():
        prefers = saved_args.get("preferred_terms", terms)
        same_task = model.config.max_sum == reference.config.max_sum
        if not same_task or (path != sft and saved_args.get("reference", known) != known):
            print(f"Left out {path}: it was not trained from {sft}; --sft names another reference")
        elif terms and prefers != terms:
            print(
                f"Left out {path}: it prefers {prefers} terms, and not {terms}; evaluate it alone"
            )
        else:
            included[path], terms = (model, saved_args, log), prefers
    return included, terms or 3


def label_of(saved_args):
    """The kind of training: "SFT", "mistakes", "offline + KL", "pairs.jsonl, ipo"."""
    if "pairs" not in saved_args:
        return "SFT"
    label = os.path.basename(saved_args["pairs"])
    label += " + NLL" * bool(saved_args.get("nll_weight"))
    label += " + KL" * bool(saved_args.get("kl_weight"))
    label += ", smoothed" * bool(saved_args.get("label_smoothing"))
    loss = saved_args.get("loss", "sigmoid")
    return label if loss == "sigmoid" else f"{label}, {loss}"


def labelled(loaded):
    """{label: (model, saved args, log)}. Models that share a label show their paths as well."""
    kinds = [label_of(saved_args) for _, saved_args, _ in loaded.values()]
    labels = [k if kinds.count(k) == 1 else f"{k} ({path})" for k, path in zip(kinds, loaded)]
    labels = [label.encode("utf-8", "replace").decode() for label in labels]  # paths are any bytes
    return dict(zip(labels, loaded.values()))


# ---- what they answer ------------------------------------------------------------------------


def result_of(model, sampled, logratios, terms, seed):
    """Metrics of sampled answers with their log-ratios, and of greedy ones; some of the answers."""
    generator, max_sum = torch.Generator(model.head.weight.device), model.config.max_sum
    held_out = tuple(f"{n}=" for n in held_out_sums(max_sum))
    greedy = answer(model, range(MIN_SUM, max_sum + 1), greedy=True)
    wrong = [equation for equation in sampled if not is_exact(equation)]
    return {
        "sampled": measure(sampled, terms),
        "held out": measure([a for a in sampled if a.startswith(held_out)], terms),
        "greedy": measure(greedy, terms),
        "kl": logratios.mean().item(),
        "answers": answer(model, shown_sums(max_sum), generator=generator.manual_seed(seed)),
        "wrong": random.Random(seed).sample(wrong, min(3, len(wrong))),
    }


def ask(models, sums, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for label, (model, saved_args, _) in models.items():
            terms = saved_args.get("preferred_terms", 3)
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            answers = answer(model, [n], greedy=True) + answer(model, [n] * 3, generator=generator)
            greedy, *sampled = (mark(equation, terms) for equation in answers)
            print(f"{label:>15}  greedy {greedy:<31}  sampled {'  '.join(sampled)}")
            if not MIN_SUM <= n <= model.config.max_sum:
                print(f"{label:>15}  has learned the sums from {MIN_SUM} to {model.config.max_sum}")


# ---- the table -------------------------------------------------------------------------------

COLUMNS = {  # shares of the sampled answers, but for the mean absolute error and the KL
    "preferred": lambda result: result["sampled"]["preferred"],
    "exact": lambda result: result["sampled"]["exact"],
    "mean abs. error": lambda result: result["sampled"]["mae"],
    "parse rate": lambda result: result["sampled"]["parse_rate"],
    "KL (nats)": lambda result: result["kl"],
}


def rounded(value):
    """A number of a table: "0.987", "12.3", and an empty cell for None."""
    return "" if value is None else f"{value:.{3 if abs(value) < 10 else 1}f}"


def markdown(header, rows):
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    first, *others = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([first, "|" + "---|" * len(header), *others])


def table(results):
    """A row per model: the share of answers with the preferred number of terms, and COLUMNS."""
    terms, rows = str(results["task"]["preferred_terms"]), []
    for label, result in results["models"].items():
        values = [value(result) for value in COLUMNS.values()]
        rows.append([label, *map(rounded, [result["sampled"]["counts"].get(terms, 0.0), *values])])
    return markdown(["", f"{terms} terms", *COLUMNS], rows)


def main(args):
    loaded = load_models(args)
    if args.ask:
        return ask(labelled(loaded), args.ask, args.seed)
    loaded, terms = comparable(loaded)
    models, (reference, _, _) = labelled(loaded), loaded[args.sft]
    results_path = os.path.join(args.plots_dir, "results.json")
    check_writable(results_path)
    max_sum, generator = reference.config.max_sum, torch.Generator(args.device)
    results = {"task": {"max_sum": max_sum, "preferred_terms": terms}, "models": {}}
    sums = [n for n in range(MIN_SUM, max_sum + 1) for _ in range(args.samples)]
    for label, (model, saved_args, _) in models.items():
        sampled = answer(model, sums, generator=generator.manual_seed(args.seed))
        logratios = logratios_of(model, reference, sampled)
        result = result_of(model, sampled, logratios, terms, args.seed)
        results["models"][label] = result | {"args": saved_args}
        print(f"\n{label}: some answers, and some wrong ones")
        for equation in result["answers"] + result["wrong"]:
            print("   ", mark(equation, terms))
    write_file(results_path, json.dumps(results, indent=1).encode() + b"\n")
    print("\n" + table(results) + "\n")
    logs = {label: log for label, (_, _, log) in models.items()}
    written = figures.draw_all(results, logs, args.plots_dir)
    print(f"Wrote {', '.join([results_path, *written])}.")
    others = {*glob.glob(os.path.join(args.plots_dir, "*.[pg][ni][gf]"))} - {*written}
    if others:
        print(f"Of an earlier evaluation: {', '.join(sorted(others))}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
