"""What the models answer: mean absolute sum error, parse rate, histograms of the number of terms.

    python evaluate.py                # every checkpoint in runs/: a table, results.json and figures
    python evaluate.py --ask 100,57   # only what each of them answers to 100= and 57=

Every model answers every sum, once greedily and many times by sampling. The KL from the SFT model
is the mean of log pi - log pi_ref over a model's own sampled answers. We left out anything that
trains. plots/study/ repeats all of this over seeds and compares it with the exact optimum.
"""

import glob
import json
import os
import random

import torch

from data import DEVICES, MIN_SUM, InputError, check_writable, held_out_sums, is_exact
from data import make_parser, mark, measure, number, run_script, shown_sums, write_file
from model import answer, fingerprint, load_checkpoint, logratios_of
from plots import figures

# The models of the README: the flags of train_dpo.py that tell what a model was trained for.
MISTAKES = {"pairs": "mistakes", "loss": "sigmoid", "beta": 0.8, "lr": 1e-3}
MISTAKES |= {"label_smoothing": 0.0, "nll_weight": 0.0}
MODELS = {
    "offline": MISTAKES | {"pairs": "offline", "lr": 3e-4},
    "offline + NLL": MISTAKES | {"pairs": "offline", "nll_weight": 1.0},
    "mistakes": MISTAKES,
}


def parse_args(argv=None):
    parser = make_parser("Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="models to evaluate, or runs/*.pt")
    add("--sft", default="runs/sft.pt", help="the reference")
    add("--samples", type=number(int, 1), default=100, help="sampled answers to every sum")
    add("--ask", type=list_of_sums, metavar="N,N,...", help="only print answers to these sums")
    add("--plots-dir", default="plots", help="folder of results.json and the figures")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    return parser.parse_args(argv)


def list_of_sums(text):
    return [number(int, 1, 999)(n) for n in text.split(",")]


# ---- which models ----------------------------------------------------------------------------


def label_of(path, saved_args):
    """The name of a model, after what trained it: "SFT", "mistakes", "try: offline, lr 0.01"."""
    if "pairs" not in saved_args:
        return "SFT"
    flags = {name: saved_args[name] for name in MISTAKES}
    for label, expected in MODELS.items():
        if flags == expected:
            return label
    file = os.path.basename(path).removesuffix(".pt")
    special = [f"{name} {value}" for name, value in flags.items() if value != MISTAKES[name]]
    return f"{file}: " + ", ".join(special).removeprefix("pairs ").replace("_", " ")


def load_models(args):
    """{label: (model, saved args, log)}, the README's models first, and the preferred count."""
    paths = args.checkpoints or glob.glob("runs/*.pt")
    if not paths:
        raise InputError("there is no checkpoint in runs/; train_sft.py writes the first")
    loaded = {}
    for path in sorted(paths):
        checkpoint = load_checkpoint(path, args.device)
        label = label_of(path, checkpoint[1])
        loaded[f"{label} ({path})" if label in loaded else label] = checkpoint
    first = [label for label in ("SFT", *MODELS) if label in loaded]
    models = {label: loaded[label] for label in first} | loaded
    terms = {saved["preferred_terms"] for _, saved, _ in loaded.values() if "pairs" in saved}
    if len(terms) > 1 or len({model.config.max_sum for model, _, _ in loaded.values()}) > 1:
        raise InputError("models differ in --max-sum or --preferred-terms; name those to compare")
    return models, terms.pop() if terms else 3


def load_reference(path, models, device):
    """The reference; InputError if one of the models was trained from another."""
    reference, _, _ = load_checkpoint(path, device)
    known = fingerprint(reference)
    for label, (model, saved_args, _) in models.items():
        same_task = model.config.max_sum == reference.config.max_sum
        if not same_task or saved_args.get("reference", known) != known:
            raise InputError(f"{label} was not trained from {path}; name its reference with --sft")
    return reference


# ---- what they answer ------------------------------------------------------------------------


def evaluate(model, sampled, logratios, terms, seed):
    """Metrics of sampled answers with their log-ratios, and of greedy ones; some of the answers."""
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    max_sum = model.config.max_sum
    held_out = tuple(f"{n}=" for n in held_out_sums(max_sum))
    greedy = answer(model, range(MIN_SUM, max_sum + 1), greedy=True)
    wrong = [equation for equation in sampled if not is_exact(equation)]
    return {
        "sampled": measure(sampled, terms),
        "held out": measure([a for a in sampled if a.startswith(held_out)], terms),
        "greedy": measure(greedy, terms),
        "kl": logratios.mean().item(),
        "answers": answer(model, shown_sums(max_sum), generator=generator),
        "mistakes": random.Random(seed).sample(wrong, min(3, len(wrong))),
    }


def ask(models, sums, terms, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for label, (model, _, _) in models.items():
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            answers = answer(model, [n], greedy=True) + answer(model, [n] * 3, generator=generator)
            greedy, *sampled = (mark(equation, terms) for equation in answers)
            known = MIN_SUM <= n <= model.config.max_sum
            note = "" if known else f"  (it has learned {MIN_SUM} to {model.config.max_sum})"
            print(f"{label:>15}  greedy {greedy:<31}  sampled {'  '.join(sampled)}{note}")


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
    first, *others = ["| " + " | ".join(line) + " |" for line in (header, *rows)]
    return "\n".join([first, "|" + "---|" * len(header), *others])


def table(results):
    """A row a model: the share of answers with the preferred number of terms, and COLUMNS."""
    terms, rows = str(results["task"]["preferred_terms"]), []
    for label, result in results["models"].items():
        values = [value(result) for value in COLUMNS.values()]
        rows.append([label, *map(rounded, [result["sampled"]["counts"].get(terms, 0.0), *values])])
    return markdown(["", f"{terms} terms", *COLUMNS], rows)


# ---- the script ------------------------------------------------------------------------------


def main(args):
    models, terms = load_models(args)
    if args.ask:
        return ask(models, args.ask, terms, args.seed)
    reference = load_reference(args.sft, models, args.device)
    results_path = os.path.join(args.plots_dir, "results.json")
    check_writable(results_path)
    max_sum = reference.config.max_sum
    results = {"task": {"max_sum": max_sum, "preferred_terms": terms}, "models": {}}
    sums = [n for n in range(MIN_SUM, max_sum + 1) for _ in range(args.samples)]
    for label, (model, saved_args, _) in models.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)
        sampled = answer(model, sums, generator=generator)
        logratios = logratios_of(model, reference, sampled)
        result = evaluate(model, sampled, logratios, terms, args.seed)
        results["models"][label] = result | {"args": saved_args}
        print(f"\n{label}: some answers, and some of its mistakes")
        for equation in result["answers"] + result["mistakes"]:
            print("   ", mark(equation, terms))
    write_file(results_path, json.dumps(results, indent=1).encode() + b"\n")
    print("\n" + table(results) + "\n")
    logs = {label: log for label, (_, _, log) in models.items()}
    written = figures.draw_all(results, logs, args.plots_dir)
    print(f"Wrote {', '.join([results_path, *written])}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
