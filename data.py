"""Random equations such as 43=10+30+3: the text, its tokens, and what is known exactly about it.

    python data.py                              # a few equations
    python data.py --pairs                      # a few preference pairs
    python data.py --count 1000 --out eq.txt    # a thousand, one per line

An equation is a prompt, `43=`, and a completion, `10+30+3`, closed by an end token. The sum N, the
number of terms K and the terms are all drawn uniformly, so the probability of every equation has a
closed form and no model's loss can fall below a known floor. Left out on purpose: operators other
than `+`, terms of zero, files of training data. The scripts draw fresh equations as they train.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys

import numpy as np
import torch

# ---- vocabulary: one token per character, and two that are no character ----------------------

CHARACTERS = "0123456789+="
END = len(CHARACTERS)  # closes every equation
PAD = END + 1  # fills the right of a batch's shorter rows
VOCAB_SIZE = PAD + 1

TOKEN_OF = {character: token for token, character in enumerate(CHARACTERS)}


def encode(text):
    """Token ids of a text, without an end token: "9=4+5" -> [9, 11, 4, 10, 5].

    Raises ValueError for a character outside the vocabulary.
    """
    try:
        return [TOKEN_OF[character] for character in text]
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is not one of the characters {CHARACTERS}") from None


def decode(tokens):
    """Text up to the first end token: [9, 11, 4, 10, 5, END] -> "9=4+5".

    Without an end token the text closes with an ellipsis, which no parser takes for an answer.
    A pad token before the end shows as "?".
    """
    text = ""
    for token in tokens:
        if token == END:
            return text
        text += CHARACTERS[token] if token < END else "?"
    return text + "…"


EQUATION = re.compile(r"([1-9][0-9]*)=([1-9][0-9]*(?:\+[1-9][0-9]*)*)")


def parse(equation):
    """The sum and the terms an equation names, right or wrong: "9=3+3+4" -> (9, [3, 3, 4]).

    None where any part of the text is not of the form N=a1+a2+...+aK, with positive integers
    written without leading zeros and K >= 1.
    """
    match = EQUATION.fullmatch(equation)
    if match is None:
        return None
    return int(match[1]), [int(term) for term in match[2].split("+")]


def is_preferred(equation, preferred_terms):
    """Whether an answer is what we want: right, and of the preferred number of terms."""
    parsed = parse(equation)
    return parsed is not None and parsed[0] == sum(parsed[1]) and len(parsed[1]) == preferred_terms


# ---- the task: which sums, how many terms, how likely ----------------------------------------

MIN_SUM = 5  # the least sum that still splits into five positive terms
DEFAULT_MAX_SUM = 100
MAX_SUM_RANGE = (20, 999)
TERM_COUNTS = (2, 3, 4, 5)
HELD_OUT = 10  # so many sums stay out of all training data


def held_out_sums(max_sum=DEFAULT_MAX_SUM):
    """Ten sums, one in each of ten equal slices of the range: 11, 20, 30, ..., 87, 96.

    A little past the middles, since a middle would be 10, and 10 is like no other sum: it has two
    digits, and none of its terms can. Its neighbours do not teach it.
    """
    slice_width = (max_sum - MIN_SUM) / HELD_OUT
    return [round(MIN_SUM + slice_width * (i + 0.6)) for i in range(HELD_OUT)]


def seen_sums(max_sum=DEFAULT_MAX_SUM):
    """The sums that training draws from: all but the held-out ones."""
    held_out = held_out_sums(max_sum)
    return [n for n in range(MIN_SUM, max_sum + 1) if n not in held_out]


def equation_nats(n, k):
    """-log p(completion | N) in nats under the generator, for any completion of N with K terms.

    K is one of 4 and the composition one of C(N-1, K-1), each equally likely.
    """
    return math.log(len(TERM_COUNTS)) + math.log(math.comb(n - 1, k - 1))


def entropy_floor(sums):
    """Mean nats per equation that no model can go below, for sums drawn uniformly from `sums`.

    H = log 4 + mean over N and K of log C(N-1, K-1): 9.18 nats for N = 5..100.
    """
    return float(np.mean([equation_nats(n, k) for n in sums for k in TERM_COUNTS]))


def nats_per_equation(examples):
    """Mean surprise of examples (prompt, completion) under the generator, in nats.

    The floor for just these: subtracted from a model's loss on them it leaves the gap to the
    entropy floor, with far less noise than the floor of all equations would.
    """
    parsed = [parse(prompt + completion) for prompt, completion in examples]
    return float(np.mean([equation_nats(n, len(terms)) for n, terms in parsed]))


def longest_equation(max_sum=DEFAULT_MAX_SUM):
    """Tokens in the longest equation, the end token included: 19 up to a sum of 100."""
    most = TERM_COUNTS[-1]
    digits = len(str(max_sum - most + 1))  # of the largest term beside four others
    return len(f"{max_sum}=") + most * digits + (most - 1) + 1


# ---- the generator ---------------------------------------------------------------------------


def compositions(rng, sums, counts):
    """Completions for `sums` (B,) with `counts` (B,) terms, uniform over all C(N-1, K-1) of each.

    A composition of N into K positive terms is a choice of K-1 cut points among 1..N-1: here those
    with the smallest of N-1 random keys. [43], [3] -> ["10+30+3"], say.
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


def random_pairs(rng, count, sums, preferred_terms, wrong_share=0.0):
    """`count` pairs (prompt, chosen, rejected) in which chosen is right and of the preferred form.

    Chosen has `preferred_terms` terms. Rejected has another count of 2..5, all equally likely, and
    is right as well; but for a share of the pairs it misses the sum by up to 10 either way.
    """
    sums = rng.choice(sums, count)
    others = [k for k in TERM_COUNTS if k != preferred_terms]
    miss = rng.integers(1, 11, count) * (rng.random(count) < wrong_share)
    below = (rng.random(count) < 0.5) & (sums - miss >= MIN_SUM)
    chosen = compositions(rng, sums, np.full(count, preferred_terms))
    rejected = compositions(rng, sums + np.where(below, -miss, miss), rng.choice(others, count))
    return [(f"{n}=", c, r) for n, c, r in zip(sums, chosen, rejected)]


# ---- batches and files -----------------------------------------------------------------------


def collate(examples):
    """Examples (prompt, completion) as right-padded tokens (B, T) and a completion mask (B, T).

    T is the longest example's length, end token included. The mask is True on the completion and
    its end token; it is made from positions, so it never mistakes a token for padding.
    [("9=", "4+5")] -> [[9, 11, 4, 10, 5, END]], [[False, False, True, True, True, True]]
    """
    starts = np.array([len(prompt) for prompt, _ in examples], int)[:, None]
    ends = starts + np.array([len(completion) for _, completion in examples], int)[:, None]
    positions = np.arange(ends.max(initial=0) + 1)
    tokens = np.full((len(examples), len(positions)), PAD)
    tokens[positions < ends] = encode(
        "".join(prompt + completion for prompt, completion in examples)
    )
    tokens[positions == ends] = END
    mask = (starts <= positions) & (positions <= ends)
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def read_pairs(path, max_length):
    """Pairs (prompt, chosen, rejected) from a file of JSON lines with exactly these keys.

    Raises InputError, naming file and line, for anything that a model of `max_length` positions
    and this vocabulary could not be trained on.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    pairs.append(parse_pair(line, max_length))
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the pairs file {path}: {error}") from None
    if not pairs:
        raise InputError(f"{path} holds no pair; data.py --pairs --out {path} writes some")
    return pairs


def parse_pair(line, max_length):
    """One line of a pairs file as (prompt, chosen, rejected), or a ValueError that says why not."""
    keys = ("prompt", "chosen", "rejected")
    try:
        pair = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(pair, dict) or set(pair) != set(keys):
        raise ValueError(f"a pair is an object with exactly the keys {', '.join(keys)}")
    for key in keys:
        if not isinstance(pair[key], str):
            raise ValueError(f"{key} must be a string, not {json.dumps(pair[key])}")
        try:
            encode(pair[key])
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    if not re.fullmatch(r"[1-9][0-9]*=", pair["prompt"]):
        raise ValueError(
            f"prompt must be a sum and an equals sign, such as 9=, not {pair['prompt']!r}"
        )
    for key in keys[1:]:
        length = len(pair["prompt"]) + len(pair[key]) + 1
        if length > max_length:
            raise ValueError(
                f"prompt, {key} and end token are {length} tokens; the model has room for "
                f"{max_length}"
            )
    return tuple(pair[key] for key in keys)


# ---- what the scripts share: errors in one line, files never half-written ---------------------


class InputError(Exception):
    """Input that cannot be used. The message is one line: what is wrong and what to do."""


def diverged(step, losses, out):
    """The error of a run whose loss is not finite any more at `step`."""
    last = f"it was {losses[-1]:.3f} the step before" if losses else "in the first step"
    return InputError(
        f"the loss is not finite at step {step} ({last}); {out} is not touched; try a lower --lr"
    )


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with its errors in one line."""

    def error(self, message):
        raise InputError(f"{message} (--help lists the options)")


def run_script(main):
    """Runs a script: bad input ends in one line and exit status 2, Ctrl-C in silence and 130."""
    script = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks for all
            print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left: `data.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Opens a temporary file beside `path` that replaces it when the block ends well."""
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        with open(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)  # still there only if the block failed


# ---- command line ----------------------------------------------------------------------------


def integer_in(least, most):
    """An argparse type: an integer from `least` to `most`."""

    def convert(text):
        if not re.fullmatch(r"[+-]?[0-9]+", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return convert


def positive_number(text):
    """An argparse type: a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def parse_args(argv=None):
    parser = ArgumentParser(description="Print or write random equations or preference pairs.")
    parser.add_argument(
        "--count", type=integer_in(1, 10**9), default=10, help="how many (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=integer_in(0, 2**63 - 1), default=0, help="of the generator (%(default)s)"
    )
    parser.add_argument(
        "--max-sum",
        type=integer_in(*MAX_SUM_RANGE),
        default=DEFAULT_MAX_SUM,
        help="largest sum (%(default)s)",
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="preference pairs as JSON lines {prompt, chosen, rejected}",
    )
    parser.add_argument(
        "--preferred-terms",
        type=integer_in(2, 5),
        default=3,
        help="terms of the chosen side (%(default)s)",
    )
    parser.add_argument("--out", metavar="FILE", help="write here, not to the terminal")
    return parser.parse_args(argv)


def main(args):
    rng = np.random.default_rng(args.seed)
    sums = np.array(seen_sums(args.max_sum))
    with replacing(args.out) if args.out else contextlib.nullcontext(sys.stdout) as file:
        for start in range(0, args.count, 1000):
            count = min(1000, args.count - start)
            if args.pairs:
                for prompt, chosen, rejected in random_pairs(
                    rng, count, sums, args.preferred_terms
                ):
                    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                    print(json.dumps(pair), file=file)
            else:
                for prompt, completion in random_equations(rng, count, sums):
                    print(prompt + completion, file=file)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
