"""What the models answer: mean absolute sum error, parse rate, histograms of the number of terms.

    python evaluate.py
    python evaluate.py --ask 100,57

The first command measures every checkpoint in runs/: it prints a table and writes results.json and
figures. The second one only prints what each of them answers to 100= and 57=.

Every model answers every sum, once greedily and many times by sampling. The KL from the SFT model
is the mean of log pi - log pi_ref over a model's own sampled answers. A model is named after what
trained it, such as "offline + KL". plots/study/ repeats all of this over seeds.
"""

import json
import os
import random
from glob import glob
from statistics import mode

import torch

from data import (DEFAULT_TERMS, DEVICES, MIN_SUM, check_writable, held_out_sums, is_exact,
                  make_parser, mark, measure, number, run_script, seen_sums, shown_sums,
                  write_file)  # fmt: skip
from model import answers_to, device_of, fingerprint, load_checkpoint, logratios_of
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
    for path in args.checkpoints or sorted(glob("runs/*.pt"), key=os.path.getmtime):
        if os.path.realpath(path) not in map(os.path.realpath, paths):
            paths.append(path)
    return {path: load_checkpoint(path, args.device) for path in paths}


def comparable(loaded):
    """The models that fit the first, which is the reference, and what most of them prefer."""
    (sft, (reference, _, _)), *_ = loaded.items()
    known, max_sum, included = fingerprint(reference), reference.config.max_sum, {}
    counts = [x["preferred_terms"] for _, x, _ in loaded.values() if "preferred_terms" in x]
    preferred_terms = mode(counts or [DEFAULT_TERMS])
    for path, (model, saved_args, _) in loaded.items():
        prefers = saved_args.get("preferred_terms", preferred_terms)
        if model.config.max_sum != max_sum:
            reason = f"its sums go up to {model.config.max_sum}, and those of {sft} to {max_sum}"
        elif path != sft and saved_args.get("reference", known) != known:
            reason = f"it was trained from {saved_args['sft']}, not from {sft} as it is now"
        elif prefers != preferred_terms:
            reason = f"it prefers {prefers} terms, and not {preferred_terms}"
        else:
            included[path] = loaded[path]
            continue
        print(f"Left out {path}: {reason}. Evaluate it alone, with its SFT model as --sft.")
    return included, preferred_terms


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


def seeded(model, seed):
    return torch.Generator(device_of(model)).manual_seed(seed)


def sampled_answers(model, reference, samples, seed):
    """Answers to every sum, those to one sum side by side, and their log-ratios in nats."""
    sums = [n for n in range(MIN_SUM, model.config.max_sum + 1) for _ in range(samples)]
    answers = answers_to(model, sums, generator=seeded(model, seed))
    return answers, logratios_of(model, reference, answers)


def result_of(model, reference, preferred_terms, samples, seed):
    """Metrics of sampled and of greedy answers, the KL in nats, and some of the answers."""
    answers, logratios = sampled_answers(model, reference, samples, seed)
    max_sum = model.config.max_sum
    held_out = tuple(f"{n}=" for n in held_out_sums(max_sum))
    greedy = answers_to(model, range(MIN_SUM, max_sum + 1), greedy=True)
    wrong = [answer for answer in answers if not is_exact(answer)]
    return {
        "sampled": measure(answers, preferred_terms),
        "held out": measure([a for a in answers if a.startswith(held_out)], preferred_terms),
        "greedy": measure(greedy, preferred_terms),
        "kl": logratios.mean().item(),
        "answers": answers_to(model, shown_sums(max_sum), generator=seeded(model, seed)),
        "wrong": random.Random(seed).sample(wrong, min(3, len(wrong))),
    }


def ask(models, sums, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for label, (model, saved_args, _) in models.items():
            preferred_terms = saved_args.get("preferred_terms", DEFAULT_TERMS)
            answers = answers_to(model, [n], greedy=True)
            answers += answers_to(model, [n] * 3, generator=seeded(model, seed))
            greedy, *sampled = (mark(answer, preferred_terms) for answer in answers)
            print(f"{label:>15}  greedy {greedy:<31}  sampled {'  '.join(sampled)}")
            if n not in seen_sums(model.config.max_sum):
                print(f"{label:>15}  has never seen the sum {n}")


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
    """A row per model: the share of answers with the preferred number of terms, and COLUMNS."""
    preferred_terms, rows = results["task"]["preferred_terms"], []
    for label, result in results["models"].items():
        of_preferred_form = result["sampled"]["counts"].get(str(preferred_terms), 0.0)
        values = [of_preferred_form, *(value(result) for value in COLUMNS.values())]
        rows.append([label, *map(rounded, values)])
    return markdown(["", f"{preferred_terms} terms", *COLUMNS], rows)


def main(args):
    loaded = load_models(args)
    if args.ask:
        return ask(labelled(loaded), args.ask, args.seed)
    loaded, preferred_terms = comparable(loaded)
    models, (reference, _, _) = labelled(loaded), loaded[args.sft]
    for name in ("results.json", *figures.FILES):
        check_writable(os.path.join(args.plots_dir, name))
    task = {"max_sum": reference.config.max_sum, "preferred_terms": preferred_terms}
    results = {"task": task, "models": {}}
    for label, (model, saved_args, _) in models.items():
        result = result_of(model, reference, preferred_terms, args.samples, args.seed)
        results["models"][label] = result | {"args": saved_args}
        print(f"\n{label}: some answers, and some wrong ones")
        for equation in result["answers"] + result["wrong"]:
            print("   ", mark(equation, preferred_terms))
    print("\n" + table(results) + "\n")
    logs = {label: log for label, (_, _, log) in models.items()}
    written = figures.draw_all(results, logs, args.plots_dir)
    written.append(os.path.join(args.plots_dir, "results.json"))  # last: make looks at its time
    write_file(written[-1], json.dumps(results, indent=1).encode() + b"\n")
    print(f"Wrote {', '.join(written)}.")
    drawn = (path for kind in ("png", "gif") for path in glob(f"{args.plots_dir}/*.{kind}"))
    if earlier := sorted({*drawn} - {*written}):
        print(f"Of an earlier evaluation: {', '.join(earlier)}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
