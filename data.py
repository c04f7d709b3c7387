"""Random equations such as 43=10+30+3: the generator, the parser, the metrics, the tokens.

    python data.py
    python data.py --pairs --count 1000 > pairs.jsonl

The first command prints ten equations, the second one writes a thousand preference pairs. An
equation is a prompt, `43=`, and a completion, `10+30+3`. An *answer* is an equation whose
completion a model wrote. Sum, number of terms and terms are drawn uniformly, so the probability of
every equation is known. We left out a stored training set: training draws fresh equations. What
the scripts share (flags, errors, writing files) is at the end.
"""

import argparse
import json
import math
import os
import random
import re
import secrets
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch

# ---- the task: which sums, how many terms, how likely ----------------------------------------

MIN_SUM = 5  # the least sum that can be split into five positive terms
DEFAULT_MAX_SUM = 100
DEFAULT_TERMS = 3  # what is preferred
TERM_COUNTS = (2, 3, 4, 5)


def held_out_sums(max_sum=DEFAULT_MAX_SUM):
    """Ten sums that never occur in training, spread over the range: 11, 20, 30, ..., 87, 96."""
    return [round(MIN_SUM + (max_sum - MIN_SUM) * (i + 0.6) / 10) for i in range(10)]


def seen_sums(max_sum=DEFAULT_MAX_SUM):
    """The sums that training draws from: all but the held-out ones."""
    return sorted(set(range(MIN_SUM, max_sum + 1)) - set(held_out_sums(max_sum)))


def shown_sums(max_sum=DEFAULT_MAX_SUM):
    """The sums whose answers the scripts print: 100, 57 and 43, or their like."""
    return [round(share * max_sum) for share in (1, 0.57, 0.43)]


def entropy_floor(equations):
    """Mean -log p of equations under the generator, given their sums, in nats.

    On fresh equations no model has a lower loss on average. A completion of N with K terms has the
    probability 1 / (4 C(N-1, K-1)); the mean is 9.179 nats over 5..100, and 9.163 in training.
    """
    kinds = [(n, len(terms)) for n, terms in map(parse, equations)]
    return fmean(math.log(4 * math.comb(n - 1, k - 1)) for n, k in kinds)


def longest_completion(max_sum=DEFAULT_MAX_SUM):
    """Characters of the longest completion: 14 for a sum of 100."""
    return 5 * len(str(max_sum - 4)) + 4  # five terms and the plus signs between


# ---- the generator ---------------------------------------------------------------------------


def composition(rng, n, k):
    """`n` as a sum of `k` positive terms, uniform over all C(n-1, k-1): 43, 3 -> "10+30+3".

    A composition is a choice of k-1 cut points among 1..n-1; the terms lie between the cuts.
    """
    cuts = sorted(rng.sample(range(1, n), k - 1))
    return "+".join(str(end - start) for start, end in zip([0, *cuts], [*cuts, n]))


def random_equations(rng, count, sums):
    """`count` examples (prompt, completion) of sums drawn uniformly from `sums`."""
    examples = []
    for _ in range(count):
        n, k = rng.choice(sums), rng.choice(TERM_COUNTS)
        examples.append((f"{n}=", composition(rng, n, k)))
    return examples


def random_pairs(rng, count, sums, preferred_terms):
    """`count` pairs (prompt, chosen, rejected) of right completions to sums drawn from `sums`.

    Chosen has `preferred_terms` terms. Rejected has another count of 2..5, all equally likely.
    """
    pairs, other_counts = [], [k for k in TERM_COUNTS if k != preferred_terms]
    for _ in range(count):
        n, k = rng.choice(sums), rng.choice(other_counts)
        pairs.append((f"{n}=", composition(rng, n, preferred_terms), composition(rng, n, k)))
    return pairs


# ---- answers and their metrics ---------------------------------------------------------------

EQUATION = re.compile(r"([1-9][0-9]*)=([1-9][0-9]*(?:\+[1-9][0-9]*)*)")


def parse(equation):
    """The sum and the terms of an equation, right or wrong: "9=3+3+4" -> (9, [3, 3, 4]).

    None if any part of the text is not of the form N=a1+a2+...+aK, with K >= 1 and positive
    integers without leading zeros.
    """
    match = EQUATION.fullmatch(equation)
    return match and (int(match[1]), [int(term) for term in match[2].split("+")])


def is_exact(equation):
    """Whether the text is an equation whose terms add up."""
    parsed = parse(equation)
    return parsed is not None and parsed[0] == sum(parsed[1])


def is_preferred(equation, preferred_terms):
    """Whether an answer is what we want: exact, and of the preferred number of terms."""
    return is_exact(equation) and equation.count("+") == preferred_terms - 1


def measure(answers, preferred_terms):
    """Metrics of answers such as "9=3+3+3".

    All are shares of the n answers (counts and exact_counts by number of terms), but mae: the mean
    |N - sum of terms| of the answers that parse, or None if none does.
    """
    parsed = [result for result in map(parse, answers) if result]
    errors = [abs(n - sum(terms)) for n, terms in parsed]
    counts = Counter(len(terms) for _, terms in parsed)
    exact_counts = Counter(len(terms) for n, terms in parsed if n == sum(terms))
    n = len(answers)
    return {
        "n": n,
        "parse_rate": len(parsed) / n,
        "mae": sum(errors) / len(errors) if errors else None,
        "exact": errors.count(0) / n,
        "preferred": exact_counts[preferred_terms] / n,
        "counts": {str(k): counts[k] / n for k in sorted(counts)},
        "exact_counts": {str(k): exact_counts[k] / n for k in sorted(exact_counts)},
    }


def mark(answer, preferred_terms):
    """An answer to look at: right, right with other terms, off by some amount, or no equation."""
    parsed = parse(answer)
    if parsed is None:
        return f"✗ {answer} (no equation)"
    n, terms = parsed
    if sum(terms) != n:
        return f"✗ {answer} (off by {sum(terms) - n:+d})"
    return f"✓ {answer}" + ("" if len(terms) == preferred_terms else f" ({len(terms)} terms)")


# ---- tokens: one per character, and one for the end ------------------------------------------

CHARACTERS = "0123456789+="
END = len(CHARACTERS)  # closes every equation
VOCAB_SIZE = END + 1
PROMPT_WIDTH = 4  # columns of a prompt: the model reads 43= as 043=
CUT_OFF = "…"  # closes a completion that the model did not end


def encode(text):
    """Token ids of a text, without an end token: "9=4+5" -> [9, 11, 4, 10, 5]."""
    return [CHARACTERS.index(character) for character in text]


def decode(tokens):
    """Text up to the end token: [4, 10, 5, END, 7] -> "4+5". Without one: [4, 10, 5] -> "4+5…"."""
    if END in tokens:
        return "".join(CHARACTERS[token] for token in tokens[: tokens.index(END)])
    return "".join(CHARACTERS[token] for token in tokens) + CUT_OFF


def collate(examples, device="cpu"):
    """Examples (prompt, completion) as tokens (B, T) and a completion mask (B, T).

    Zeros on the left bring every prompt to four characters, so every completion starts in column 4.
    The mask is True on the completion and its own end token. END also fills up the rows on the
    right, so the mask comes from columns, never from token values. A completion that closes with
    an ellipsis was cut off and has no end token of its own.
    [("9=", "4+5")] -> [[0, 0, 9, 11, 4, 10, 5, END]] and four times False, four times True
    """
    rows = []
    for prompt, completion in examples:
        if not re.fullmatch("[0-9]{1,3}=", prompt):
            raise ValueError(f"a prompt must be a sum of one to three digits and =, not {prompt!r}")
        row = encode(prompt.rjust(PROMPT_WIDTH, "0") + completion.removesuffix(CUT_OFF))
        rows.append(row if completion.endswith(CUT_OFF) else row + [END])
    T = max(map(len, rows), default=PROMPT_WIDTH)
    tokens = [row + [END] * (T - len(row)) for row in rows]
    mask = [[PROMPT_WIDTH <= column < len(row) for column in range(T)] for row in rows]
    shape = len(rows), T
    tokens = torch.tensor(tokens, dtype=torch.long, device=device).view(shape)
    return tokens, torch.tensor(mask, dtype=torch.bool, device=device).view(shape)


# ---- files of pairs --------------------------------------------------------------------------


def read_pairs(path, max_sum, preferred_terms):
    """Pairs from a file of JSON lines {"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}.

    Raises InputError, with file and line, for what no model up to `max_sum` could learn from.
    """
    pairs, longest = [], longest_completion(max_sum)
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for i, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    pairs.append(parse_pair(line, longest))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {i} is not a usable pair: {error}") from None
    if not pairs:
        raise InputError(f"{path} holds no pair; data.py --pairs > {path} writes some")
    seen, n = seen_sums(max_sum), len(pairs)
    odd = sum(int(x[:-1]) not in seen or not (parse(x + c) and parse(x + r)) for x, c, r in pairs)
    other = sum(not is_preferred(x + chosen, preferred_terms) for x, chosen, _ in pairs)
    if odd:
        print(f"Warning: {odd} of {n} pairs have an unseen sum or a side that is no sum.")
    if other:
        print(f"Warning: {other} of {n} chosen sides are not exact with {preferred_terms} terms.")
    return pairs


def parse_pair(line, longest):
    """One line of a file as (prompt, chosen, rejected), or a ValueError that says why not."""
    pair, side = json.loads(line), f"[0-9+]{{0,{longest}}}"
    for key, form in (("prompt", "[1-9][0-9]{0,2}="), ("chosen", side), ("rejected", side)):
        value = pair.get(key) if isinstance(pair, dict) else None
        if not isinstance(value, str) or not re.fullmatch(form, value):
            raise ValueError(f"its {key} must be a string of the form {form}, not {value!r}")
    if pair["chosen"] == pair["rejected"]:
        raise ValueError("chosen and rejected are the same")
    return pair["prompt"], pair["chosen"], pair["rejected"]


# ---- shared by the scripts: flags, errors, and files that are never half-written --------------

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


def run_script(main):
    """Runs a script: bad input or Ctrl-C ends in one line and a status, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")  # a terminal that has no ✓ shows ?
    try:
        main()
        sys.stdout.flush()
    except (InputError, OSError) as error:  # a BrokenPipeError if nobody reads what we print
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.stdout = None  # else what is left in it fails again at exit
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nInterrupted: what was not finished was not written.", file=sys.stderr)
        sys.exit(130)


def check_writable(path):
    """Finds out before any work whether write_file can write `path`; makes its folder."""
    exists, folder = os.path.exists(path), os.path.dirname(os.path.realpath(path))
    if not os.path.basename(path) or (exists and not os.path.isfile(path)):
        raise InputError(f"cannot write {path!r}; give the name of a file")
    if exists and not os.stat(path).st_mode & 0o222:
        raise InputError(f"{path} is write-protected; give another name")
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as trial:
        trial.write(bytes(1_000_000))  # a full disk has no room for it


def write_file(path, content):
    """Writes bytes to a new file, which then replaces `path`, or the file it links to."""
    target = Path(path).resolve()
    temporary = target.with_name(f"{secrets.token_hex(8)}.tmp")  # a name that no file has
    try:
        temporary.write_bytes(content)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    try:
        temporary.replace(target)
    except OSError as error:  # what was computed stays
        raise InputError(f"cannot write {path}: {error.strerror}; it is in {temporary}") from None


# ---- command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = make_parser("Print random equations, or preference pairs.")
    add = parser.add_argument
    add("--count", type=number(int, 1, 100_000), default=10, help="how many")
    add("--max-sum", type=number(int, 20, 999), default=DEFAULT_MAX_SUM, help="largest sum")
    add("--pairs", action="store_true", help="JSON lines {prompt, chosen, rejected}")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=DEFAULT_TERMS, help="chosen")
    return parser.parse_args(argv)


def main(args):
    rng, sums = random.Random(args.seed), seen_sums(args.max_sum)
    if args.pairs:
        for pair in random_pairs(rng, args.count, sums, args.preferred_terms):
            print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))))
    else:
        for prompt, completion in random_equations(rng, args.count, sums):
            print(prompt + completion)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `data.py | head` ends without an error
    run_script(lambda: main(parse_args()))
