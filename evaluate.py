"""What the models answer: mean absolute sum error, parse rate, histograms of the number of terms.

    python evaluate.py                # every checkpoint in runs/: a table, results.json and figures
    python evaluate.py --ask 100,57   # only what each of them answers to 100= and 57=

Every model answers every sum, once greedily and many times by sampling. The KL from the SFT model
is the mean of log pi - log pi_ref over a model's own sampled answers. We left out anything that
trains. plots/lesson.py repeats all of this over seeds and compares it with the exact optimum.
"""

import glob
import json
import os
from pathlib import Path

import numpy as np
import torch

from data import DEVICES, MIN_SUM, InputError, atomic_write, check_writable, collate, held_out_sums
from data import is_exact, log_path, make_parser, mark, measure, number, run_script, shown_sums
from model import completion_logps, fingerprint, generate, load_checkpoint
from plots import figures, tables

CHUNK = 1000  # answers at a time


def parse_args(argv=None):
    parser = make_parser("Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="models to evaluate, or runs/*.pt")
    add("--sft", default="runs/sft.pt", help="the reference")
    add("--samples", type=number(int, 1), default=100, help="sampled answers to every sum")
    add("--ask", type=sums_to_ask, metavar="N,N,...", help="only print answers to these sums")
    add("--plots-dir", default="plots", help="folder of results.json and the figures")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    return parser.parse_args(argv)


def sums_to_ask(text):
    return [number(int, 1, 999)(n) for n in text.split(",")]


# ---- one model -------------------------------------------------------------------------------


def answer(model, sums, greedy=False, generator=None):
    """An answer to each of `sums`, as a list of equations."""
    prompts = [f"{n}=" for n in sums]
    chunks = [prompts[i : i + CHUNK] for i in range(0, len(prompts), CHUNK)]
    answers = [a for chunk in chunks for a in generate(model, chunk, greedy, generator)]
    return [prompt + completion for prompt, completion in zip(prompts, answers)]


@torch.no_grad()
def logps_of(model, equations):
    """log pi(y|x) in nats of the completion of each equation: (equations,)."""
    device, logps = model.head.weight.device, []
    for i in range(0, len(equations), CHUNK):
        splits = [equation.partition("=") for equation in equations[i : i + CHUNK]]
        batch = collate([(n + equals, completion) for n, equals, completion in splits])
        logps.append(completion_logps(model, *(x.to(device) for x in batch)))
    return torch.cat(logps).cpu()


def logratios_of(model, reference, equations):
    """log pi - log pi_ref in nats of the completion of each equation: (equations,)."""
    return logps_of(model, equations) - logps_of(reference, equations)


def evaluate(model, sampled, logratios, terms, seed):
    """Metrics of sampled answers with their log-ratios, and of greedy ones; some of the answers."""
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    max_sum = model.config.max_sum
    held_out = tuple(f"{n}=" for n in held_out_sums(max_sum))
    greedy = answer(model, range(MIN_SUM, max_sum + 1), greedy=True)
    wrong = [equation for equation in sampled if not is_exact(equation)]
    return {
        "sampled": measure(sampled, terms),
        "held out": measure([e for e in sampled if e.startswith(held_out)], terms),
        "greedy": measure(greedy, terms),
        "kl": logratios.mean().item(),
        "answers": answer(model, shown_sums(max_sum), generator=generator),
        "mistakes": np.random.default_rng(seed).permutation(wrong)[:3].tolist(),
    }


def ask(models, sums, terms, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    for n in sums:
        for name, model in models.items():
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            answers = answer(model, [n], greedy=True) + answer(model, [n] * 3, generator=generator)
            greedy, *sampled = (mark(equation, terms) for equation in answers)
            known = MIN_SUM <= n <= model.config.max_sum
            note = "" if known else f"  (it has learned {MIN_SUM} to {model.config.max_sum})"
            print(f"{name:>15}  greedy {greedy:<31}  sampled {'  '.join(sampled)}{note}")


# ---- the script ------------------------------------------------------------------------------


def load_models(args):
    """{name: model}, {name: saved args}, {name: log} and the preferred number of terms."""
    paths = args.checkpoints or glob.glob("runs/*.pt")
    if not paths:
        raise InputError("there is no checkpoint in runs/; train_sft.py writes the first")
    names = [os.path.basename(path).removesuffix(".pt") for path in paths]
    if len(set(names)) < len(names):
        names = [path.removesuffix(".pt") for path in paths]
    paths = dict(zip(names, paths))
    models, saved, logs = {}, {}, {}
    for name in figures.in_order(names):
        models[name], saved[name] = load_checkpoint(paths[name], args.device)
        logs[name] = read_log(paths[name], saved[name].get("steps"))
    terms = {saved_args.get("preferred_terms") for saved_args in saved.values()} - {None}
    if len(terms) > 1 or len({model.config.max_sum for model in models.values()}) > 1:
        raise InputError("checkpoints differ in --max-sum or --preferred-terms; name some")
    return models, saved, logs, terms.pop() if terms else 3


def read_log(path, steps):
    """The log beside a checkpoint; an empty one if it is not whole, or not of so many steps."""
    try:
        log = [json.loads(line) for line in Path(log_path(path)).read_text().splitlines()]
        if log[-1]["step"] == steps:
            return log
    except (OSError, ValueError, LookupError, TypeError):
        pass
    print(f"{log_path(path)} is not the log of {path}, so its curves are left out.")
    return []


def training_seconds(log):
    """The seconds of a run, from its log; None without one."""
    return next((record["seconds"] for record in reversed(log) if "seconds" in record), None)


def load_reference(path, models, saved, device):
    """The reference; InputError if one of the models was trained from another."""
    reference, _ = load_checkpoint(path, device)
    known = fingerprint(reference)
    for name, model in models.items():
        same_task = model.config.max_sum == reference.config.max_sum
        if not same_task or saved[name].get("reference", known) != known:
            raise InputError(f"{name} was not trained from {path}; name its reference with --sft")
    return reference


def main(args):
    models, saved, logs, terms = load_models(args)
    if args.ask:
        return ask(models, args.ask, terms, args.seed)
    reference = load_reference(args.sft, models, saved, args.device)
    results_path = os.path.join(args.plots_dir, "results.json")
    check_writable(results_path)
    task = {"max_sum": reference.config.max_sum, "preferred_terms": terms}
    results = {"task": task, "models": {}}
    sums = np.repeat(range(MIN_SUM, reference.config.max_sum + 1), args.samples)
    for name, model in models.items():
        generator = torch.Generator(args.device).manual_seed(args.seed)
        sampled = answer(model, sums, generator=generator)
        logratios = logratios_of(model, reference, sampled)
        result = evaluate(model, sampled, logratios, terms, args.seed)
        result |= {"args": saved[name], "seconds": training_seconds(logs[name])}
        results["models"][name] = result
        print(f"\n{name}: some answers, and some of its mistakes")
        for equation in result["answers"] + result["mistakes"]:
            print("   ", mark(equation, terms))
    atomic_write(results_path, json.dumps(results, indent=1).encode() + b"\n")
    runs = {name: [result] for name, result in results["models"].items()}
    print("\n" + tables.models_table(runs, terms) + "\n")
    written = figures.draw_all(results, logs, args.plots_dir)
    print(f"Wrote {', '.join([results_path, *written])}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
