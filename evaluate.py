"""What the checkpoints answer, measured, held against the exact optimum, and drawn.

    python evaluate.py                # every checkpoint in runs/: results and figures in plots/
    python evaluate.py --ask 100 57   # what each of them answers to 100= and 57=

Every model answers every sum, greedily once and sampled many times. An answer is exact if it parses
and its terms add up, and preferred if it has the preferred number of terms besides. Left out on
purpose: anything that trains.
"""

import glob
import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import torch

from data import MIN_SUM, PROMPT_WIDTH, InputError, collate, decode, held_out_sums, is_exact
from data import is_preferred, make_parser, nats_per_equation, parse, positive_int, random_equations
from data import random_pairs, read_json, replacing, run_script, seen_sums
from model import completion_logps, find_device, fingerprint, generate, load_checkpoint, log_path
from model import token_logps
from plots import figures, tables

CHUNK = 1000  # answers are generated at a time
TOKEN_SEED, TOKEN_PAIRS = 1_000_003, 2000  # of the pairs in which tokens are looked at
GAP_SEED, GAP_SIZE = 1_000_004, 20_000  # of the equations on which the gap to the floor is measured
ENUMERABLE, TRIES = 200_000, 300  # preferred answers; of more, p_N is sampled by so many answers
SHOWN_SUMS = (100, 57, 43)  # an answer to each is shown of every model


def parse_args(argv=None):
    parser = make_parser("Measure what checkpoints answer, and draw it.")
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="models to evaluate, or runs/*.pt")
    add("--sft", default="runs/sft.pt", help="the reference")
    add("--samples", type=positive_int, default=100, help="sampled answers to every sum")
    add("--ask", nargs="+", type=positive_int, metavar="N", help="only print the answers to N=")
    add("--plots-dir", default="plots", help="folder of results.json and the figures")
    add("--replot", action="store_true", help="only redraw, from the JSON files in --plots-dir")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    args = parser.parse_args(argv)
    if max(args.ask or [0]) > 999:
        parser.error("--ask takes sums up to 999: the models read three digits")
    if args.samples < 2:
        parser.error("--samples is at least 2: of one there is no standard error")
    return args


# ---- metrics ---------------------------------------------------------------------------------


def answer(model, sums, greedy=False, generator=None):
    """The answers to each of `sums` as text, and their (tokens, completion mask) in chunks."""
    equations, chunks = [], []
    for start in range(0, len(sums), CHUNK):
        prompts = [f"{n}=" for n in sums[start : start + CHUNK]]
        chunks.append(generate(model, prompts, greedy, generator))
        equations += [decode(row) for row in chunks[-1][0].tolist()]
    return equations, chunks


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
        "preferred": exact_counts[preferred_terms] / n,
        "counts": {str(k): counts[k] / n for k in sorted(counts)},
        "exact_counts": {str(k): exact_counts[k] / n for k in sorted(exact_counts)},
        "n": n,
    }


@torch.no_grad()
def logps_of(model, batches):
    """log pi(y|x) in nats of the completions in batches (tokens, completion mask): (all rows,)."""
    device = model.head.weight.device
    parts = [completion_logps(model, *(x.to(device) for x in batch)) for batch in batches]
    return torch.cat(parts).cpu()


def in_batches(examples):
    """Examples (prompt, completion) as batches (tokens, completion mask), one at a time."""
    return (collate(examples[i : i + CHUNK]) for i in range(0, len(examples), CHUNK))


def gap_to_floor(model):
    """Nats per equation by which the model's loss exceeds the entropy floor, on the seen sums."""
    sums = seen_sums(model.config.max_sum)
    examples = random_equations(np.random.default_rng(GAP_SEED), GAP_SIZE, sums)
    return -logps_of(model, in_batches(examples)).mean().item() - nats_per_equation(examples)


# ---- theory: what the best policy would pay --------------------------------------------------
# p_N is the share of preferred answers that the reference gives to N. With reward r for them, 0 for
# others, the optimum (arXiv 2305.18290, eq. 4) multiplies their odds by t = exp(r / beta), no more.
# Over t, the points (share, KL) are the frontier: no policy has a larger share at the same KL.


def preferred_shares(reference, preferred_terms, generator):
    """p_N for N = 5, 6, ...: (sums,), below 1; exact, unless there are too many to enumerate."""
    sums = range(MIN_SUM, reference.config.max_sum + 1)
    numbers = [math.comb(n - 1, preferred_terms - 1) for n in sums]
    if sum(numbers) > ENUMERABLE:
        equations = (answer(reference, [n] * TRIES, generator=generator)[0] for n in sums)
        found = [sum(is_preferred(e, preferred_terms) for e in some) for some in equations]
        return (torch.tensor(found, dtype=torch.float64) + 0.5) / (TRIES + 1)
    examples = []
    for n in sums:
        for cuts in itertools.combinations(range(1, n), preferred_terms - 1):
            terms = (str(end - start) for start, end in zip((0, *cuts), (*cuts, n)))
            examples.append((f"{n}=", "+".join(terms)))
    probabilities = logps_of(reference, in_batches(examples)).double().exp()
    return torch.stack([part.sum() for part in probabilities.split(numbers)]).clamp(max=1 - 1e-6)


def tilt(p, log_t):
    """Mean share and KL in nats of the optimum whose odds of p (sums,) are multiplied by t."""
    odds = p.logit() + log_t
    normalizer = torch.logaddexp(p.log() + log_t, (-p).log1p())  # log(p t + 1 - p)
    return odds.sigmoid().mean().item(), (odds.sigmoid() * log_t - normalizer).mean().item()


def frontier_at(p, share):
    """(KL, log t) of the frontier at a mean share, by bisection; 0 where the reference has it."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tilt(p, middle)[0] < share else (low, middle)
    return tilt(p, low)[1], low


def best_of(p, n):
    """Mean share and KL in nats of the best of n answers of the reference."""
    share = 1 - (1 - p) ** n
    return share.mean().item(), coin_kl(share, p).mean().item()


def coin_kl(s, p):
    """KL of two coins that fall on preferred with probability s and p, elementwise."""
    return torch.xlogy(s, s / p) + torch.xlogy(1 - s, (1 - s) / (1 - p))


def split_kl(ratios, good, p):
    """The KL from the reference and its parts, each as [mean, standard error] in nats.

    `ratios`, log pi - log pi_ref, and `good`, whether preferred, are (sums, samples) of the
    policy's own answers; p (sums,). With E the preferred answers and s their share,
        KL = kl(s || p) + s KL(pi_E || ref_E) + (1 - s) KL(pi_notE || ref_notE)
    is what the preference needs, drift among preferred answers, and drift among all others. The
    excess is KL less that of the frontier at the mean share. Errors by the delta method; the bias
    of s log s with a sampled s, (1 - s) / 2n to first order, is taken off.
    """
    ratios, good = ratios.double(), good.double()
    s, n = good.mean(1), good.shape[1]
    inside = s.clamp(0.5 / n, 1 - 0.5 / n)  # where logs and slopes are finite
    log_s, log_not = (inside / p).log(), ((1 - inside) / (1 - p)).log()  # (sums,)
    least, log_t = frontier_at(p, s.mean().clamp(max=1 - 0.5 / good.numel()).item())
    bias = torch.where((s > 0) & (s < 1), 0.5 / n, 0.0)
    needed = coin_kl(s, p) - bias
    drift = (ratios * good).mean(1) - torch.xlogy(s, s / p) + bias * (1 - s)
    other = (ratios * (1 - good)).mean(1) - torch.xlogy(1 - s, (1 - s) / (1 - p)) + bias * s
    slopes = (log_s - log_not)[:, None], (log_s + 1)[:, None], (log_not + 1)[:, None]
    parts = {  # mean, and the sample's influence on it (sums, samples)
        "total": (ratios.mean(), ratios),
        "needed": (needed.mean(), slopes[0] * good),
        "preferred": (drift.mean(), (ratios - slopes[1]) * good),
        "others": (other.mean(), (ratios - slopes[2]) * (1 - good)),
        "excess": (ratios.mean() - least, ratios - log_t * good),
    }
    errors = {name: (x.var(1) / n).sum().sqrt() / len(p) for name, (_, x) in parts.items()}
    return {name: [mean.item(), errors[name].item()] for name, (mean, _) in parts.items()}


# ---- which token pays ------------------------------------------------------------------------

TOKEN_KINDS = ("end token", "plus signs", "last term", "other digits")


def token_kinds(completion):
    """The kind of every token of a completion and its end token, as indices of TOKEN_KINDS."""
    last_term = completion.rfind("+") + 1
    kinds = [1 if c == "+" else 2 if i >= last_term else 3 for i, c in enumerate(completion)]
    return kinds + [0]


def who_pays(model, reference, preferred_terms):
    """Where in the answers of the generator's pairs a model differs from the reference.

    For chosen and rejected: mean nats per answer by kind of token, over TOKEN_PAIRS pairs; and
    token by token the first three pairs of sums of two digits.
    """
    rng, sums = np.random.default_rng(TOKEN_SEED), seen_sums(model.config.max_sum)
    pairs = random_pairs(rng, TOKEN_PAIRS, sums, preferred_terms)
    shown = [i for i, (prompt, *_) in enumerate(pairs) if len(prompt) == 3][:3]
    result = {"strings": []}
    for column, side in ((1, "chosen"), (2, "rejected")):
        texts = [(pair[0], pair[column]) for pair in pairs]
        tokens, completion_mask = (x.to(model.head.weight.device) for x in collate(texts))
        with torch.no_grad():
            policy, ref = (token_logps(m, tokens, completion_mask) for m in (model, reference))
        rows = (policy - ref).cpu().numpy()[:, PROMPT_WIDTH - 1 :]  # from the completion on
        by_kind = np.zeros(len(TOKEN_KINDS))
        for (_, text), row in zip(texts, rows):
            np.add.at(by_kind, token_kinds(text), row[: len(text) + 1])
        result[side] = dict(zip(TOKEN_KINDS, (by_kind / len(pairs)).tolist()))
        for i in shown:
            prompt, text = texts[i]
            nats = rows[i, : len(text) + 1].tolist()
            result["strings"].append({"prompt": prompt, "side": side, "text": text, "nats": nats})
    return result


# ---- one model -------------------------------------------------------------------------------


def evaluate(model, reference, p, preferred_terms, samples, seed):
    """What results.json says of one model's answers."""
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)
    sums = np.arange(MIN_SUM, model.config.max_sum + 1)
    result = {}
    for decoding, per_sum in (("greedy", 1), ("sampled", samples)):
        asked = np.repeat(sums, per_sum)
        equations, chunks = answer(model, asked, decoding == "greedy", generator)
        held_out = np.isin(asked, held_out_sums(model.config.max_sum))
        splits = {"all": np.full(len(asked), True), "seen": ~held_out, "held_out": held_out}
        result[decoding] = {
            split: measure(list(itertools.compress(equations, rows)), preferred_terms)
            for split, rows in splits.items()
        }
    good = torch.tensor([is_preferred(equation, preferred_terms) for equation in equations])
    ratios = logps_of(model, chunks) - logps_of(reference, chunks)
    result["kl"] = split_kl(ratios.view(-1, samples), good.view(-1, samples), p)
    exact = np.reshape([is_exact(equation) for equation in equations], (-1, samples)).mean(1)
    result["lowest_exact"] = [float(exact.min()), int(sums[exact.argmin()])]
    outside = [n for n in outside_sums(model.config.max_sum) for _ in range(samples)]
    result["outside"] = measure(answer(model, outside, generator=generator)[0], preferred_terms)
    result["answers"] = answer(model, SHOWN_SUMS, generator=generator)[0]
    largest = answer(model, [sums[-1]] * 10 * samples, generator=generator)[0]
    result["exact_at_largest"] = measure(largest, preferred_terms)["exact"]
    wrong = [equation for equation in equations if not is_exact(equation)]
    result["mistakes"] = list(np.random.default_rng(seed).permutation(wrong)[:3])
    return result


def outside_sums(max_sum):
    """The sums just outside of the training range, where nobody promises anything."""
    return [*range(2, MIN_SUM), *range(max_sum + 1, min(max_sum + 11, 1000))]


# ---- answers to look at ----------------------------------------------------------------------


def mark(equation, preferred_terms):
    """An answer with a mark: right and preferred, right alone, wrong (by how much), no equation."""
    n, terms = parse(equation) or (0, [])
    if not terms:
        return f"✗ {equation} (no equation)"
    if sum(terms) != n:
        return f"✗ {equation} (off by {sum(terms) - n:+d})"
    return f"✓ {equation}" + ("" if len(terms) == preferred_terms else f" ({len(terms)} terms)")


def ask(models, sums, preferred_terms, seed):
    """Prints the greedy answer of every model to every sum, and three sampled ones."""
    width = max(map(len, models))
    for n in sums:
        max_sum = next(iter(models.values())).config.max_sum
        if not MIN_SUM <= n <= max_sum:
            print(f"{n} is outside of {MIN_SUM}..{max_sum}, the sums these models have learned:")
        for name, model in models.items():
            generator = torch.Generator(model.head.weight.device).manual_seed(seed)
            greedy, _ = answer(model, [n], greedy=True)
            sampled, _ = answer(model, [n] * 3, generator=generator)
            answers = [mark(equation, preferred_terms) for equation in greedy + sampled]
            print(f"{name:>{width}}  greedy {answers[0]:<40}  sampled {'  '.join(answers[1:])}")


# ---- the script ------------------------------------------------------------------------------


def load_models(args, device):
    """{name: model}, {name: saved args}, {name: log} and the preferred count of checkpoints."""
    paths = args.checkpoints or glob.glob("runs/*.pt")
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    if not paths:
        raise InputError("there is no checkpoint in runs/; train_sft.py writes the first")
    if len(set(names)) < len(names):
        raise InputError("two checkpoints have the same file name, their name in tables")
    paths = dict(zip(names, paths))
    loaded = {name: load_checkpoint(paths[name], device) for name in figures.in_order(names)}
    models = {name: model for name, (model, _) in loaded.items()}
    saved = {name: args for name, (_, args) in loaded.items()}
    max_sums = {model.config.max_sum for model in models.values()}
    preferred = {args["preferred_terms"] for args in saved.values() if "preferred_terms" in args}
    if len(max_sums) > 1 or len(preferred) > 1:
        raise InputError("checkpoints differ in --max-sum or --preferred-terms; name some")
    logs = {name: read_log(paths[name]) for name in loaded}
    return models, saved, logs, preferred.pop() if preferred else 3


def load_reference(path, models, saved, device):
    """The reference at `path`, or InputError if one of the models was trained from another."""
    reference, _ = load_checkpoint(path, device)
    known = fingerprint(reference)
    for name, model in models.items():
        ours = model.config.max_sum == reference.config.max_sum
        if not ours or saved[name].get("reference", known) != known:
            raise InputError(f"{name} was not trained from {path}; name its reference with --sft")
    return reference


def read_log(checkpoint_path):
    """The records of the log beside a checkpoint, up to a line that is cut short."""
    path, records = log_path(checkpoint_path), []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    records.append({"seconds": None} | json.loads(line))
                except (TypeError, ValueError):
                    print(f"{path} is cut short in line {len(records) + 1}; the rest is left out")
                    break
    return records


def redraw(folder):
    """Every figure again, from the JSON files of an earlier evaluation."""
    results, logs = (read_json(os.path.join(folder, f"{x}.json")) for x in ("results", "logs"))
    try:
        figures.draw_all(results, logs, folder)
        if os.path.exists(os.path.join(folder, "published.json")):
            figures.draw_published(read_json(os.path.join(folder, "published.json")), folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise InputError(f"the JSON files in {folder} are not of this project") from None


def main(args):
    if args.replot:
        return redraw(args.plots_dir)
    device = find_device(args.device)
    models, saved, logs, preferred_terms = load_models(args, device)
    if args.ask:
        return ask(models, args.ask, preferred_terms, args.seed)
    reference = load_reference(args.sft, models, saved, device)
    published = tables.published_models()
    paths = [os.path.join(args.plots_dir, f"{name}.json") for name in ("logs", "results")]
    with replacing(*paths) as files:
        generator = torch.Generator(device).manual_seed(args.seed)
        p = preferred_shares(reference, preferred_terms, generator)
        task = {"max_sum": reference.config.max_sum, "preferred_terms": preferred_terms}
        results = {"task": task, "p": p.tolist(), "models": {}}
        for name, model in models.items():
            result = evaluate(model, reference, p, preferred_terms, args.samples, args.seed)
            result["args"] = saved[name]
            result["seconds"] = logs[name][-1]["seconds"] if logs[name] else None
            if "preferred_terms" in saved[name]:
                result["tokens"] = who_pays(model, reference, preferred_terms)
            else:
                result["gap"] = gap_to_floor(model)
            results["models"][name] = result
            print(f"\n{name}: some answers, and some of its mistakes")
            for equation in result["answers"] + result["mistakes"]:
                print("   ", mark(equation, preferred_terms))
        figures.draw_all(results, logs, args.plots_dir)
        for file, content in zip(files, (logs, results)):
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    found = {name: tables.summarise([result]) for name, result in results["models"].items()}
    print("\n" + tables.models_table({"models": found}))
    if published:
        print(f"\nPublished, mean ± standard deviation over seeds:\n\n{published}")
    print(f"\nFigures, results.json and logs.json are in {args.plots_dir}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
