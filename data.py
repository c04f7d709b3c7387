"""Random equations such as 43=10+30+3: the generator, the parser, the metrics, the tokens.

    python data.py                                      # ten equations
    python data.py --pairs --count 1000 > pairs.jsonl   # a thousand preference pairs

An equation is a prompt, `43=`, and a completion, `10+30+3`, closed by an end token. The sum, the
number of terms and the terms are drawn uniformly, so the probability of every equation is known. We
left out operators other than `+`, terms of zero, and data files: training draws fresh equations.
"""

import argparse
import atexit
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

# ---- tokens: one per character, and one for the end ------------------------------------------

CHARACTERS = "0123456789+="
EQUALS = CHARACTERS.index("=")
END = len(CHARACTERS)  # closes every equation
VOCAB_SIZE = END + 1
PAD = VOCAB_SIZE  # fills the right of short rows; the model has no input and no output for it
CUT_OFF = "…"  # closes an answer that the model did not end


def encode(text):
    """Token ids of a text, without an end token: "9=4+5" -> [9, 11, 4, 10, 5]."""
    return [CHARACTERS.index(character) for character in text]


def decode(tokens):
    """Text up to the end token: [4, 10, 5, END, PAD] -> "4+5", but [4, 10, 5, PAD] -> "4+5…"."""
    if END in tokens:
        return "".join(CHARACTERS[token] for token in tokens[: tokens.index(END)])
    return "".join(CHARACTERS[token] for token in tokens if token != PAD) + CUT_OFF


def collate(examples):
    """Examples (prompt, completion) as tokens (B, T) and a completion mask (B, T).

    Every prompt starts in column 0, and padding is on the right. The mask is True on the completion
    and its end token. It is made from positions, so it never mistakes a token for padding. A
    completion that closes with an ellipsis was cut off and gets no end token.
    [("9=", "4+5")] -> [[9, 11, 4, 10, 5, END]], [[False, False, True, True, True, True]]
    """
    rows = []
    for prompt, completion in examples:
        row = encode(prompt + completion.removesuffix(CUT_OFF))
        rows.append(row if completion.endswith(CUT_OFF) else row + [END])
    B, T = len(rows), max(map(len, rows), default=2)
    padded = [row + [PAD] * (T - len(row)) for row in rows]
    starts = torch.tensor([len(prompt) for prompt, _ in examples])[:, None]  # (B, 1)
    ends = torch.tensor([len(row) for row in rows])[:, None]  # (B, 1)
    columns = torch.arange(T)
    tokens = torch.tensor(padded, dtype=torch.long).view(B, T)
    return tokens, (starts <= columns) & (columns < ends)


# ---- answers and their metrics ---------------------------------------------------------------

EQUATION = re.compile(r"([1-9][0-9]*)=([1-9][0-9]*(?:\+[1-9][0-9]*)*)")


def parse(equation):
    """The sum and the terms of an equation, right or wrong: "9=3+3+4" -> (9, [3, 3, 4]).

    None if any part of the text is not of the form N=a1+a2+...+aK, with K >= 1 and positive
    integers without leading zeros.
    """
    match = EQUATION.fullmatch(equation)
    if match is None:
        return None
    return int(match[1]), [int(term) for term in match[2].split("+")]


def is_exact(equation):
    """Whether the text is an equation whose terms add up."""
    n, terms = parse(equation) or (1, [])
    return n == sum(terms)


def is_preferred(equation, preferred_terms):
    """Whether an answer is what we want: exact, and of the preferred number of terms."""
    return is_exact(equation) and equation.count("+") == preferred_terms - 1


def measure(equations, preferred_terms):
    """Metrics of answers such as "9=3+3+3".

    All are shares of the n answers (counts and exact_counts by number of terms), but mae: the mean
    |N - sum of terms| of the answers that parse, or None if none does.
    """
    results = list(map(parse, equations))
    parsed = [result for result in results if result]
    errors = [abs(n - sum(terms)) for n, terms in parsed]
    counts = Counter(len(terms) for _, terms in parsed)
    exact_counts = Counter(len(terms) for n, terms in parsed if n == sum(terms))
    n = len(results)
    return {
        "n": n,
        "parse_rate": len(parsed) / n,
        "mae": sum(errors) / len(errors) if errors else None,
        "exact": errors.count(0) / n,
        "preferred": exact_counts[preferred_terms] / n,
        "counts": {str(k): counts[k] / n for k in sorted(counts)},
        "exact_counts": {str(k): exact_counts[k] / n for k in sorted(exact_counts)},
    }


def mark(equation, preferred_terms):
    """An answer to look at: right, right with other terms, off by some amount, or no equation."""
    n, terms = parse(equation) or (0, [])
    if not terms:
        return f"✗ {equation} (no equation)"
    if sum(terms) != n:
        return f"✗ {equation} (off by {sum(terms) - n:+d})"
    return f"✓ {equation}" + ("" if len(terms) == preferred_terms else f" ({len(terms)} terms)")


# ---- the task: which sums, how many terms, how likely ----------------------------------------

MIN_SUM = 5  # the least sum that can be split into five positive terms
DEFAULT_MAX_SUM = 100
TERM_COUNTS = (2, 3, 4, 5)


def held_out_sums(max_sum=DEFAULT_MAX_SUM):
    """Ten sums that never occur in training, spread over the range: 11, 20, 30, ..., 87, 96."""
    return [round(MIN_SUM + (max_sum - MIN_SUM) * (i + 0.6) / 10) for i in range(10)]


def seen_sums(max_sum=DEFAULT_MAX_SUM):
    """The sums that training draws from: all but the held-out ones."""
    return np.setdiff1d(np.arange(MIN_SUM, max_sum + 1), held_out_sums(max_sum))


def shown_sums(max_sum=DEFAULT_MAX_SUM):
    """The sums whose answers the scripts print: 100, 57 and 43, or their like."""
    return [round(share * max_sum) for share in (1, 0.57, 0.43)]


def entropy_floor(equations):
    """Mean -log p of equations under the generator, given their sums, in nats.

    No model can have a lower loss on them. A completion of N with K terms has the probability
    1 / (4 C(N-1, K-1)); the mean is 9.179 nats over 5..100, and 9.163 over the sums of training.
    """
    kinds = [(n, len(terms)) for n, terms in map(parse, equations)]
    return float(np.mean([math.log(4 * math.comb(n - 1, k - 1)) for n, k in kinds]))


def longest_completion(max_sum=DEFAULT_MAX_SUM):
    """Characters of the longest completion: 14 for a sum of 100."""
    return 5 * len(str(max_sum - 4)) + 4  # five terms and the plus signs between


# ---- the generator ---------------------------------------------------------------------------


def compositions(rng, sums, counts):
    """Completions for `sums` (B,) with `counts` (B,) terms, uniform over all C(N-1, K-1) of each.

    A composition of N into K positive terms is a choice of K-1 cut points among 1..N-1. We take
    those with the smallest of N-1 random keys. [43], [3] -> ["10+30+3"], for example.
    """
    sums, counts = np.asarray(sums)[:, None], np.asarray(counts)[:, None]  # (B, 1)
    most_cuts = TERM_COUNTS[-1] - 1
    points = np.arange(1, max(sums.max(initial=0), MIN_SUM))
    keys = np.where(points < sums, rng.random((len(sums), len(points))), 2.0)  # (B, max N - 1)
    cuts = points[np.argsort(keys, axis=1)[:, :most_cuts]]  # (B, 4), those past N-1 last
    cuts = np.where(np.arange(most_cuts) < counts - 1, cuts, sums)  # unused cuts leave empty terms
    edges = np.concatenate([np.zeros_like(sums), np.sort(cuts, axis=1), sums], axis=1)
    terms = np.diff(edges, axis=1)  # (B, 5)
    return ["+".join(map(str, row[:k])) for row, k in zip(terms.tolist(), counts[:, 0].tolist())]


def random_equations(rng, count, sums):
    """`count` examples (prompt, completion) of sums drawn uniformly from `sums`."""
    sums = rng.choice(sums, count)
    counts = rng.choice(TERM_COUNTS, count)
    return [(f"{n}=", completion) for n, completion in zip(sums, compositions(rng, sums, counts))]


def random_pairs(rng, count, sums, preferred_terms):
    """`count` pairs (prompt, chosen, rejected) of right answers to sums drawn from `sums`.

    Chosen has `preferred_terms` terms. Rejected has another count of 2..5, all equally likely.
    """
    sums = rng.choice(sums, count)
    others = [k for k in TERM_COUNTS if k != preferred_terms]
    chosen = compositions(rng, sums, np.full(count, preferred_terms))
    rejected = compositions(rng, sums, rng.choice(others, count))
    return [(f"{n}=", c, r) for n, c, r in zip(sums, chosen, rejected)]


def shuffled_forever(rng, items):
    """The items in random order, then all of them again in another order, and so on."""
    while True:
        for i in rng.permutation(len(items)):
            yield items[i]


# ---- files of pairs --------------------------------------------------------------------------


def read_pairs(path, max_sum):
    """Pairs from a file of JSON lines {"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}.

    Raises InputError, with file and line, for what no model up to `max_sum` could learn from. Warns
    of sums that such a model was not trained on.
    """
    content, pairs = Path(path).read_bytes(), []
    text = content.decode(json.detect_encoding(content), "replace")
    for i, line in enumerate(text.splitlines(), start=1):
        try:
            if line.strip():
                pairs.append(parse_pair(line, longest_completion(max_sum)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}, line {i} is not a usable pair: {error}") from None
    if not pairs:
        raise InputError(f"{path} holds no pair; data.py --pairs > {path} writes some")
    seen = seen_sums(max_sum)
    unseen = [prompt for prompt, _, _ in pairs if int(prompt[:-1]) not in seen]
    if unseen:
        print(f"Warning: {len(unseen)} of {len(pairs)} pairs have sums that SFT never had.")
    return pairs


def parse_pair(line, longest):
    """One line of a file as (prompt, chosen, rejected), or a ValueError that says why not."""
    pair = json.loads(line)
    prompt, chosen, rejected = (pair[key] for key in ("prompt", "chosen", "rejected"))
    if not re.fullmatch(r"[1-9][0-9]{0,2}=", prompt):
        raise ValueError(f"the prompt must be a sum up to 999 and =, not {prompt!r}")
    if not all(re.fullmatch(f"[0-9+]{{0,{longest}}}", side) for side in (chosen, rejected)):
        raise ValueError(f"an answer must be at most {longest} digits and +, without the prompt")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return prompt, chosen, rejected


# ---- what the scripts share: flags, errors in one line, files never half-written --------------

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.mps.is_available()


class InputError(Exception):
    """Input that cannot be used. The message is one line: what is wrong and what to do."""


def number(kind, low, high=1_000_000_000):
    """An argparse type: an int or a float from `low` to `high`."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # for "invalid int value"
    return convert


def make_parser(description):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="random seed")
    return parser


def check_writable(*paths):
    """Finds out before any work whether atomic_write can write the paths; makes their folders."""
    for path in paths:
        if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise InputError(f"cannot write {path!r}; give the name of a file")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(f"{path}.tmp").touch()
        os.remove(f"{path}.tmp")


def atomic_write(path, content):
    """Writes bytes to a temporary file, which then replaces `path`."""
    Path(f"{path}.tmp").write_bytes(content)
    os.replace(f"{path}.tmp", path)


def log_path(checkpoint_path):
    """runs/sft.pt -> runs/sft.jsonl"""
    return str(checkpoint_path).removesuffix(".pt") + ".jsonl"


def run_script(main):
    """Runs a script: bad input ends in one line and exit status 2, Ctrl-C without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no ✓ shows ?
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left: `data.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def join_processes():
    """The rank and the world size of this process: (0, 1), unless torchrun started several."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def add_up(tensors):
    """Replaces each tensor by its sum over all processes; with one process, leaves them."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))


# ---- command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = make_parser("Print random equations, or preference pairs.")
    add = parser.add_argument
    add("--count", type=number(int, 1, 100_000), default=10, help="how many")
    add("--max-sum", type=number(int, 20, 999), default=DEFAULT_MAX_SUM, help="largest sum")
    add("--pairs", action="store_true", help="JSON lines {prompt, chosen, rejected}")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=3, help="of the chosen side")
    return parser.parse_args(argv)


def main(args):
    rng, sums = np.random.default_rng(args.seed), seen_sums(args.max_sum)
    if args.pairs:
        for pair in random_pairs(rng, args.count, sums, args.preferred_terms):
            print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))))
    else:
        for prompt, completion in random_equations(rng, args.count, sums):
            print(prompt + completion)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
