"""The text, the generator against its closed form, the parser, batches and pairs files."""

import json
import math
import os
import re
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch

import data


def test_encode_and_decode_are_inverse():
    assert data.encode("9=4+5") == [9, 11, 4, 10, 5]
    for text in ("100=50+50", "43=10+30+3", "9=", "0123456789+="):
        tokens = data.encode(text) + [data.END]
        assert data.decode([data.PAD] * 2 + tokens + [data.PAD] * 3) == data.decode(tokens) == text


def test_text_without_an_end_token_or_with_padding_inside_is_no_answer():
    nine, PAD, END = data.encode("9=4+5"), data.PAD, data.END
    assert data.decode(nine) == data.decode(nine + [PAD]) == "9=4+5…"
    for tokens in (nine, nine + [PAD], nine + [PAD, END], nine[:2] + [PAD] + nine[2:] + [END]):
        assert data.parse(data.decode(tokens)) is None


@pytest.mark.parametrize("text", ["9-4", "9=4 5", "9=４+5", "9=4+5\n"])
def test_encode_refuses_other_characters(text):
    with pytest.raises(ValueError):
        data.encode(text)


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("43=10+30+3", (43, [10, 30, 3])),
        ("9=9", (9, [9])),
        ("9=3+3+4", (9, [3, 3, 4])),
        ("5=1+1+1+1+1+1", (5, [1] * 6)),
    ],
)
def test_parse_accepts(text, parsed):
    assert data.parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9",
        "9=",
        "=4+5",
        "9=+",
        "9=4+",
        "9=+4",
        "9=4++5",
        "9=4+5=9",
        "9=4+05",
        "9=0+9",
        "09=4+5",
        "9=4+5\n",
        " 9=4+5",
        "9=4-5",
        "9=(4)+5",
        "9=4+5;1",
        "9=4+٥",
        "9=4.0+5",
        "9=1e1",
    ],
)
def test_parse_rejects(text):
    assert data.parse(text) is None


def test_exact_means_that_the_terms_add_up_and_preferred_also_their_number():
    assert data.is_exact("9=4+5") and data.is_exact("9=9") and data.is_exact("6=1+1+1+1+1+1")
    for answer in ("9=4+4", "9=4+05", "9=4+5…", "9=", "1=", ""):
        assert not data.is_exact(answer)
    assert data.is_preferred("9=3+3+3", 3) and data.is_preferred("9=4+5", 2)
    for answer in ("9=4+5", "9=3+3+4", "9=1+2+3+3", "9=3+3+3…", "9=+3+6"):
        assert not data.is_preferred(answer, 3)


def chi_square(observed, expected):
    return sum((observed[key] - expected[key]) ** 2 / expected[key] for key in expected)


def test_sums_and_term_counts_are_uniform_and_independent():
    n = 60_000
    examples = data.random_equations(np.random.default_rng(1), n, data.seen_sums())
    parsed = [data.parse(prompt + completion) for prompt, completion in examples]
    assert all(total == sum(terms) for total, terms in parsed)

    counts = Counter(len(terms) for _, terms in parsed)
    assert set(counts) == set(data.TERM_COUNTS)
    assert chi_square(counts, {k: n / 4 for k in data.TERM_COUNTS}) < 16.27  # 3 dof, p = 0.001

    sums = Counter(total for total, _ in parsed)
    assert set(sums) == set(data.seen_sums())
    assert chi_square(sums, {s: n / 86 for s in data.seen_sums()}) < 131.0  # 85 dof, p = 0.001

    both = Counter((total, len(terms)) for total, terms in parsed)
    every = product(sums, counts)
    assert chi_square(both, {pair: n / 344 for pair in every}) < 429.7  # 343 dof, p = 0.001


@pytest.mark.parametrize(
    "total, k, bound", [(5, 5, 0.001), (12, 2, 29.6), (9, 3, 55.5), (9, 5, 111.1), (11, 4, 172.4)]
)
def test_compositions_are_uniform(total, k, bound):
    """Against every composition, listed from its cut points; bound: chi-square at p = 0.001."""
    every = set()
    for cuts in combinations(range(1, total), k - 1):
        edges = (0, *cuts, total)
        every.add("+".join(str(b - a) for a, b in zip(edges, edges[1:])))
    assert len(every) == math.comb(total - 1, k - 1)

    n = 200 * len(every)
    sums = np.full(2 * n, total)
    sums[n:] = 100  # a batch of unequal sums, where cut points past the smaller one exist
    counts = Counter(data.compositions(np.random.default_rng(2), sums, np.full(2 * n, k))[:n])
    assert set(counts) == every
    assert chi_square(counts, {text: n / len(every) for text in every}) < bound


def test_entropy_floor_is_the_mean_surprise_of_an_equation():
    assert data.entropy_floor(range(5, 101)) == pytest.approx(9.18, abs=0.005)
    n = 9
    every = [math.comb(n - 1, k - 1) for k in data.TERM_COUNTS]
    entropy = -sum(number * (1 / 4 / number) * math.log(1 / 4 / number) for number in every)
    assert data.entropy_floor([n]) == pytest.approx(entropy)
    # By hand: 2 terms of 5 are one of 4 completions, 3 terms of 9 one of 28; each K has 1/4.
    examples = [("5=", "2+3"), ("9=", "3+3+3")]
    assert data.nats_per_equation(examples) == pytest.approx((math.log(16) + math.log(112)) / 2)


@pytest.mark.parametrize("max_sum", [20, 100, 999])
def test_held_out_sums_are_spread_and_never_drawn(max_sum):
    held_out, seen = data.held_out_sums(max_sum), data.seen_sums(max_sum).tolist()
    assert len(set(held_out)) == 10
    assert sorted(held_out + seen) == list(range(5, max_sum + 1))
    assert np.diff([5, *held_out, max_sum]).max() <= math.ceil((max_sum - 5) / 10)
    rng = np.random.default_rng(5)
    drawn = [prompt for prompt, _ in data.random_equations(rng, 2000, data.seen_sums(max_sum))]
    assert set(drawn).isdisjoint(f"{n}=" for n in held_out)


def test_held_out_sums_up_to_100():
    """Slices of 9.5 from 5, each at 0.6 of its width: 10.7, 20.2, ..., 96.2."""
    assert data.held_out_sums() == [11, 20, 30, 39, 49, 58, 68, 77, 87, 96]


def test_longest_completion_is_reached_and_never_passed():
    """Against every pattern of term lengths: one of d digits is 10^(d - 1) or more."""
    patterns = [p for k in data.TERM_COUNTS for p in product((1, 2, 3), repeat=k)]
    least = [(sum(10 ** (d - 1) for d in p), sum(p) + len(p) - 1) for p in patterns]
    longest = {top: max(width for total, width in least if total <= top) for top in range(20, 1000)}
    assert all(width <= data.longest_completion(top) for top, width in longest.items())
    for top in (100, 999):  # elsewhere room for all terms of the largest one's length is too much
        assert data.longest_completion(top) == longest[top]
    sums, counts = np.full(1000, 999), np.full(1000, 5)
    drawn = data.compositions(np.random.default_rng(3), sums, counts)
    assert max(map(len, drawn)) == longest[999] == 19


@pytest.mark.parametrize("preferred", data.TERM_COUNTS)
def test_pairs_differ_in_form_alone(preferred):
    """Both sides are right; rejected has each of the other numbers of terms equally often."""
    n, numbers = 3000, Counter()
    sums = data.seen_sums()
    for prompt, chosen, rejected in data.random_pairs(np.random.default_rng(4), n, sums, preferred):
        total, chosen_terms = data.parse(prompt + chosen)
        _, rejected_terms = data.parse(prompt + rejected)
        assert sum(chosen_terms) == sum(rejected_terms) == total in sums
        assert len(chosen_terms) == preferred
        numbers[len(rejected_terms)] += 1
    others = set(data.TERM_COUNTS) - {preferred}
    assert set(numbers) == others
    assert chi_square(numbers, {k: n / 3 for k in others}) < 13.82  # 2 dof, p = 0.001


def test_collate_aligns_the_equals_signs_and_masks_completions_by_position():
    tokens, mask = data.collate([("9=", "4+5"), ("100=", "0"), ("10=", "")])
    END, PAD = data.END, data.PAD
    assert tokens.tolist() == [
        [PAD, PAD, PAD, 9, 11, 4, 10, 5, END],
        [PAD, 1, 0, 0, 11, 0, END, PAD, PAD],
        [PAD, PAD, 1, 0, 11, END, PAD, PAD, PAD],
    ]
    assert mask.tolist() == [
        [False] * 5 + [True] * 4,
        [False] * 5 + [True] * 2 + [False] * 2,
        [False] * 5 + [True] + [False] * 3,
    ]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool
    tokens, mask = data.collate([])
    assert tokens.shape == mask.shape == (0, 6)


def printed(capsys, *flags):
    """The lines that `python data.py FLAGS` prints."""
    data.main(data.parse_args(flags))
    return capsys.readouterr().out.splitlines()


def test_equations_on_the_command_line(capsys):
    """More than are drawn at once, and as many as asked for."""
    lines = printed(capsys, "--count", "1003", "--seed", "5", "--max-sum", "30")
    assert len(lines) == 1003 and all(map(data.is_exact, lines)) and len(set(lines)) > 500
    sums = {data.parse(line)[0] for line in lines}
    assert sums == set(range(5, 31)) - set(data.held_out_sums(30))
    assert printed(capsys, "--count", "7", "--seed", "5") != printed(capsys, "--count", "7")
    assert printed(capsys, "--count", "7", "--seed", "0") == printed(capsys, "--count", "7")
    assert len(printed(capsys, "--count", "7", "--seed", "4294967295")) == 7


def test_pairs_printed_on_the_command_line_can_be_read_back(tmp_path, capsys):
    flags = ("--pairs", "--count", "7", "--seed", "5", "--preferred-terms", "4")
    lines = printed(capsys, *flags)
    assert all(list(json.loads(line)) == ["prompt", "chosen", "rejected"] for line in lines)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    pairs = data.read_pairs(path, 19)
    assert pairs == data.random_pairs(np.random.default_rng(5), 7, data.seen_sums(), 4)


GOOD = '{"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}'


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("1" * 5000, "integer string conversion"),
        ("[1, 2]", "exactly the keys prompt, chosen, rejected"),
        ('{"prompt": "9=", "chosen": "3+3+3"}', "exactly the keys"),
        (GOOD.replace("}", ', "note": "x"}'), "exactly the keys"),
        (GOOD.replace("3+3+3", "3+x+3"), "chosen must be at most 19 characters"),
        (GOOD.replace("4+5", "4+5\\n"), r"not '4+5\n'"),
        (GOOD.replace('"4+5"', '["4+5"]'), "prompt, chosen and rejected must be strings"),
        (GOOD.replace('"4+5"', "45"), "prompt, chosen and rejected must be strings"),
        (GOOD.replace("4+5", "1+" * 10), "rejected must be at most 19 characters"),
        (GOOD.replace("9=", "9"), "prompt must be a sum up to 999 and ="),
        (GOOD.replace("9=", "09="), "prompt must be a sum"),
        (GOOD.replace("9=", "1000="), "prompt must be a sum"),
        (GOOD.replace('"9="', "9"), "prompt, chosen and rejected must be strings"),
    ],
    ids=lambda text: text[:60],
)
def test_bad_pairs_are_named_by_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(data.InputError) as error:
        data.read_pairs(path, 19)
    assert f"{path}, line 2: " in str(error.value) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_file_must_exist_hold_text_and_a_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(data.InputError, match=re.escape(f"cannot read the pairs file {path}")):
        data.read_pairs(path, 19)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(data.InputError, match=re.escape(f"cannot read the pairs file {path}")):
        data.read_pairs(path, 19)
    path.write_text("")
    with pytest.raises(data.InputError, match="holds no pair"):
        data.read_pairs(path, 19)
    path.write_text(GOOD.replace("4+5", "1+" * 9 + "1"))  # exactly as long as there is room for
    assert data.read_pairs(path, 19) == [("9=", "3+3+3", "1+" * 9 + "1")]


def test_files_are_replaced_together_or_not_at_all(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("before")
    for failure in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(failure), data.replacing(one, two) as files:
            for file in files:
                file.write(b"half")
            raise failure
        assert one.read_text() == "before" and list(tmp_path.iterdir()) == [one]
    with data.replacing(one, two) as files:
        for file, text in zip(files, (b"1", b"2")):
            file.write(text)
        assert one.read_text() == "before" and not two.exists()
    assert one.read_text() == "1" and two.read_text() == "2"
    assert sorted(tmp_path.iterdir()) == [one, two]


def test_a_file_that_cannot_be_written_is_named_before_any_work(tmp_path):
    one, folder, file = tmp_path / "one", tmp_path / "folder", tmp_path / "file"
    device = tmp_path / "device"
    folder.mkdir(), file.write_text("in the way"), os.mkfifo(device)
    for path in (folder, file / "below", device):
        with pytest.raises(data.InputError, match=re.escape(f"cannot write {one} or {path}: ")):
            with data.replacing(one, path):
                pytest.fail("the block is not entered")
    assert sorted(tmp_path.iterdir()) == [device, file, folder] and device.is_fifo()
    assert file.read_text() == "in the way"


def test_two_processes_that_write_the_same_file_do_not_meet(tmp_path):
    """Each leaves a whole file, and the last one to end wins."""
    path = tmp_path / "deep" / "out"
    with data.replacing(path) as [file]:
        file.write(b"mine")
        file.flush()
        child = os.fork()
        if child == 0:
            try:
                with data.replacing(path) as [its_file]:
                    its_file.write(b"its")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert path.read_text() == "its"
    assert path.read_text() == "mine" and list(path.parent.iterdir()) == [path]


def test_what_is_not_kept_is_not_written(tmp_path):
    path = tmp_path / "out"
    with data.replacing(path, tmp_path / "other", keep=False) as files:
        for file in files:
            file.write(b"nothing")
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == [] and os.path.exists(os.devnull)


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--count", "0"], "--count: invalid positive_int value: '0'"),
        (["--max-sum", "19"], "--max-sum: 19 is not from 20 to 999"),
        (["--max-sum", "1000"], "--max-sum: 1000 is not from 20 to 999"),
        (["--preferred-terms", "6"], "--preferred-terms: invalid choice: 6"),
        (["--seed", "-1"], "--seed: invalid seed value: '-1'"),
    ],
)
def test_bad_flags_are_refused(flags, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        data.parse_args(flags)
    assert error.value.code == 2 and complaint in capsys.readouterr().err
