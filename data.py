"""Random equations such as 43=10+30+3: the text, its tokens, and what is known exactly about it.

    python data.py                                      # a few equations
    python data.py --pairs --count 1000 > pairs.jsonl   # a thousand preference pairs

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
import signal
import sys

import numpy as np

# ---- vocabulary: one token per character, and two that are no character ----------------------

CHARACTERS = "0123456789+="
END = len(CHARACTERS)  # closes every equation
PAD = END + 1  # fills the left of short prompts and the right of short completions
VOCAB_SIZE = PAD + 1
SYMBOLS = CHARACTERS + "$ "  # how decode reads END and PAD


def encode(text):
    """Token ids of a text, without an end token: "9=4+5" -> [9, 11, 4, 10, 5]."""
    return [CHARACTERS.index(character) for character in text]


def decode(tokens):
    """Text up to the first end token: [PAD, PAD, 9, 11, 4, 10, 5, END] -> "9=4+5".

    Without an end token the text closes with an ellipsis, which no parser takes for an answer.
    """
    text, end, _ = "".join(SYMBOLS[token] for token in tokens).lstrip().partition("$")
    return text if end else text.rstrip() + "…"


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


def is_exact(equation):
    """Whether an answer is an equation, and its terms add up."""
    n, terms = parse(equation) or (1, [])
    return n == sum(terms)


def is_preferred(equation, preferred_terms):
    """Whether an answer is what we want: right, and of the preferred number of terms."""
    return is_exact(equation) and equation.count("+") == preferred_terms - 1


# ---- the task: which sums, how many terms, how likely ----------------------------------------

MIN_SUM = 5  # the least sum that still splits into five positive terms
DEFAULT_MAX_SUM = 100
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
    return np.setdiff1d(np.arange(MIN_SUM, max_sum + 1), held_out_sums(max_sum))


def equation_nats(n, k):
    """-log p(completion | N) in nats under the generator, for any completion of N with K terms.

    K is one of 4 and the composition one of C(N-1, K-1), each equally likely.
    """
    return math.log(len(TERM_COUNTS)) + math.log(math.comb(n - 1, k - 1))


def entropy_floor(sums):
    """Mean nats per equation that no model can go below, for sums drawn uniformly from `sums`.

    H = log 4 + mean over N and K of log C(N-1, K-1): 9.18 nats for N = 5..100.
    """
    return float(np.mean([equation_nats(int(n), k) for n in sums for k in TERM_COUNTS]))


def nats_per_equation(examples):
    """Mean surprise of examples (prompt, completion) under the generator, in nats.

    The floor for just these: subtracted from a model's loss on them it leaves the gap to the
    entropy floor, with far less noise than the floor of all equations would.
    """
    parsed = [parse(prompt + completion) for prompt, completion in examples]
    return float(np.mean([equation_nats(n, len(terms)) for n, terms in parsed]))


def longest_completion(max_sum=DEFAULT_MAX_SUM):
    """Characters that no completion exceeds: 14 up to a sum of 100."""
    most = TERM_COUNTS[-1]
    return most * len(str(max_sum - most + 1)) + most - 1  # digits, and plus signs between


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


def random_pairs(rng, count, sums, preferred_terms):
    """`count` pairs (prompt, chosen, rejected) of right answers to sums drawn from `sums`.

    Chosen has `preferred_terms` terms; rejected has another count of 2..5, all equally likely.
    """
    sums = rng.choice(sums, count)
    others = [k for k in TERM_COUNTS if k != preferred_terms]
    chosen = compositions(rng, sums, np.full(count, preferred_terms))
    rejected = compositions(rng, sums, rng.choice(others, count))
    return [(f"{n}=", c, r) for n, c, r in zip(sums, chosen, rejected)]


# ---- batches and pairs files -----------------------------------------------------------------

PROMPT_WIDTH = 5  # columns of every prompt: padding, up to three digits, the equals sign


def collate(examples):
    """Examples (prompt, completion) as tokens (B, T) and a completion mask (B, T).

    Prompts end and completions begin in the same column for all, whatever the number of digits:
    a token's column is its distance from the equals sign. The mask is True on the completion and
    its end token; it is made from positions, so it never mistakes a token for padding.
    [("9=", "4+5")] -> [[PAD, PAD, PAD, 9, 11, 4, 10, 5, END]], [[False] * 5 + [True] * 4]
    """
    import torch  # here alone: tables, figures and the command line below do without

    firsts = PROMPT_WIDTH - np.array([len(prompt) for prompt, _ in examples], int)[:, None]
    ends = PROMPT_WIDTH + np.array([len(completion) for _, completion in examples], int)[:, None]
    columns = np.arange(ends.max(initial=PROMPT_WIDTH) + 1)
    tokens = np.full((len(examples), len(columns)), PAD)
    text = "".join(prompt + completion for prompt, completion in examples)
    tokens[(firsts <= columns) & (columns < ends)] = encode(text)
    tokens[columns == ends] = END
    mask = (PROMPT_WIDTH <= columns) & (columns <= ends)
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def read_pairs(path, longest):
    """Pairs (prompt, chosen, rejected) from a file of JSON lines with exactly these keys.

    Raises InputError, naming file and line, for anything that a model with room for completions of
    `longest` characters could not be trained on.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the pairs file {path}: {error}") from None
    if not lines:
        raise InputError(f"{path} holds no pair; data.py --pairs > {path} writes some")
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            pairs.append(parse_pair(line, longest))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return pairs


def parse_pair(line, longest):
    """One line of a pairs file as (prompt, chosen, rejected), or a ValueError that says why not."""
    pair = json.loads(line)
    if not isinstance(pair, dict) or set(pair) != {"prompt", "chosen", "rejected"}:
        raise ValueError("a pair is an object with exactly the keys prompt, chosen, rejected")
    if not all(isinstance(text, str) for text in pair.values()):
        raise ValueError("prompt, chosen and rejected must be strings")
    if not re.fullmatch(r"[1-9][0-9]{0,2}=", pair["prompt"]):
        raise ValueError(f"prompt must be a sum up to 999 and =, not {pair['prompt']!r}")
    for side in ("chosen", "rejected"):
        if not re.fullmatch(f"[{CHARACTERS}]{{0,{longest}}}", pair[side]):
            raise ValueError(
                f"{side} must be at most {longest} characters of {CHARACTERS}, not {pair[side]!r}"
            )
    return pair["prompt"], pair["chosen"], pair["rejected"]


# ---- what the scripts share: flags, errors in one line, files never half-written --------------


class InputError(Exception):
    """Input that cannot be used. The message is one line: what is wrong and what to do."""


def read_json(path):
    """What a JSON file holds, or InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def positive_int(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def positive_float(text):
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def seed(text):
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def max_sum(text):
    if not 20 <= int(text) <= 999:
        raise argparse.ArgumentTypeError(f"{text} is not from 20 to 999")
    return int(text)


def make_parser(description, parents=()):
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, parents=parents, formatter_class=formatter
    )
    parser.add_argument("--seed", type=seed, default=0, help="of all that is random")
    return parser


def training_flags():
    """The flags that both training scripts have; each sets its own defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("--steps", type=positive_int, help="updates of the weights")
    add("--batch-size", type=positive_int, help="prompts a step")
    add("--lr", type=positive_float, help="highest learning rate")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    add("--out", help="checkpoint to write; its log goes beside it, as .jsonl")
    return parser


def run_script(main):
    """Runs a script: bad input ends in one line and status 2, Ctrl-C and SIGTERM without fuss."""
    name, rank = os.path.basename(sys.argv[0]), os.environ.get("RANK")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        process = "" if rank is None else f" in process {rank}"
        print(f"{name}: error{process}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left: `data.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def replacing(*paths, keep=True):
    """Temporary binary files beside `paths`, which replace them together if the block ends well.

    With `keep` off, in all processes of a run but the first, what is written goes nowhere.
    """
    temporary = [f"{path}.{os.getpid()}.tmp" if keep else os.devnull for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            if len(set(map(str, paths))) < len(paths):
                raise OSError("the log would have the same name")
            for path in paths:
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                if os.path.exists(path) and not os.path.isfile(path):
                    raise OSError(f"{path} is a folder or a device")
            files = [stack.enter_context(open(name, "wb")) for name in temporary]
            yield files
            for file in files if keep else []:
                file.flush()
                os.fsync(file.fileno())
        for name, path in zip(temporary, paths) if keep else []:
            os.replace(name, path)
    except OSError as error:
        raise InputError(f"cannot write {' or '.join(map(str, paths))}: {error}") from None
    finally:
        for name in temporary if keep else []:
            with contextlib.suppress(OSError):
                os.remove(name)  # still there only if the block failed


# ---- command line ----------------------------------------------------------------------------


def parse_args(argv=None):
    parser = make_parser("Print random equations, or preference pairs.")
    add = parser.add_argument
    add("--count", type=positive_int, default=10, help="how many")
    add("--max-sum", type=max_sum, default=DEFAULT_MAX_SUM, help="largest sum")
    add("--pairs", action="store_true", help="JSON lines {prompt, chosen, rejected}")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=3, help="of the chosen side")
    return parser.parse_args(argv)


def main(args):
    rng, sums = np.random.default_rng(args.seed), seen_sums(args.max_sum)
    for start in range(0, args.count, 1000):
        count = min(1000, args.count - start)
        if args.pairs:
            for pair in random_pairs(rng, count, sums, args.preferred_terms):
                print(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))))
        else:
            for prompt, completion in random_equations(rng, count, sums):
                print(prompt + completion)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
