"""The text, the generator against its closed form, the parser, batches and pairs files."""

import json
import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

import data


def test_encode_and_decode_are_inverse():
    text = "100=50+50"
    assert data.encode("9=4+5") == [9, 11, 4, 10, 5]
    assert data.decode(data.encode(text) + [data.END, data.PAD]) == text


def test_text_cut_off_before_its_end_token_is_no_answer():
    assert data.decode(data.encode("9=4+5")) == "9=4+5…"
    assert data.parse("9=4+5…") is None
    assert data.parse(data.decode(data.encode("9=4+5") + [data.PAD, data.END])) is None


@pytest.mark.parametrize("text", ["9-4", "9=4 5", "9=４+5", "9=4+5\n"])
def test_encode_names_the_character_it_lacks(text):
    with pytest.raises(ValueError, match="is not one of the characters"):
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


def chi_square(observed, expected):
    return sum((observed[key] - expected[key]) ** 2 / expected[key] for key in expected)


def test_sums_and_term_counts_are_uniform():
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
    assert sum(
        number * math.exp(-data.equation_nats(n, k)) for number, k in zip(every, data.TERM_COUNTS)
    ) == (pytest.approx(1.0))


@pytest.mark.parametrize("max_sum", [20, 100, 999])
def test_held_out_sums_are_spread_and_never_drawn(max_sum):
    held_out, seen = data.held_out_sums(max_sum), data.seen_sums(max_sum)
    assert len(set(held_out)) == data.HELD_OUT
    assert sorted(held_out + seen) == list(range(5, max_sum + 1))
    gaps = np.diff([5, *held_out, max_sum])
    assert gaps.max() <= math.ceil((max_sum - 5) / 10)


@pytest.mark.parametrize("max_sum", [20, 100, 104, 999])
def test_longest_equation_is_reached_and_never_passed(max_sum):
    widest = 0
    for k in data.TERM_COUNTS:
        completions = data.compositions(
            np.random.default_rng(3), np.full(20_000, max_sum), np.full(20_000, k)
        )
        widest = max(widest, max(map(len, completions)))
    # 104 may have room for five terms of three digits, but no composition of it has them.
    assert len(f"{max_sum}=") + widest + 1 <= data.longest_equation(max_sum)
    if max_sum in (100, 999):
        assert len(f"{max_sum}=") + widest + 1 == data.longest_equation(max_sum)


@pytest.mark.parametrize("preferred", data.TERM_COUNTS)
def test_pairs_differ_in_form_alone(preferred):
    rejected_counts = Counter()
    for prompt, chosen, rejected in data.random_pairs(
        np.random.default_rng(4), 500, data.seen_sums(), preferred
    ):
        total, chosen_terms = data.parse(prompt + chosen)
        _, rejected_terms = data.parse(prompt + rejected)
        assert sum(chosen_terms) == sum(rejected_terms) == total
        assert len(chosen_terms) == preferred
        rejected_counts[len(rejected_terms)] += 1
    assert set(rejected_counts) == set(data.TERM_COUNTS) - {preferred}


def test_collate_pads_right_and_masks_completions_by_position():
    tokens, mask = data.collate([("9=", "4+5"), ("10=", "0")])
    END, PAD = data.END, data.PAD
    assert tokens.tolist() == [[9, 11, 4, 10, 5, END], [1, 0, 11, 0, END, PAD]]
    assert mask.tolist() == [
        [False, False, True, True, True, True],
        [False] * 3 + [True, True, False],
    ]
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool


def test_pairs_file_round_trip(tmp_path):
    path = tmp_path / "pairs.jsonl"
    data.main(data.parse_args(["--pairs", "--count", "7", "--seed", "5", "--out", str(path)]))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(line) == ["prompt", "chosen", "rejected"] for line in lines)
    expected = data.random_pairs(np.random.default_rng(5), 7, data.seen_sums(), 3)
    assert data.read_pairs(path, 19) == expected


GOOD = '{"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}'


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "not JSON"),
        ("[1, 2]", "exactly the keys"),
        ('{"prompt": "9=", "chosen": "3+3+3"}', "exactly the keys"),
        (GOOD.replace("3+3+3", "3+x+3"), "chosen: 'x' is not one of the characters"),
        (GOOD.replace('"4+5"', "45"), "rejected must be a string"),
        (GOOD.replace("9=", "9"), "prompt must be a sum and an equals sign"),
        (GOOD.replace("4+5", "1+" * 20), "the model has room for 19"),
        ("", "not JSON"),
    ],
)
def test_bad_pairs_are_named_by_file_and_line(tmp_path, line, complaint):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(data.InputError) as error:
        data.read_pairs(path, 19)
    assert f"{path}, line 2: " in str(error.value) and complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_file_must_exist_and_hold_a_pair(tmp_path):
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(data.InputError, match="cannot read the pairs file"):
        data.read_pairs(path, 19)
    path.write_text("")
    with pytest.raises(data.InputError, match="holds no pair"):
        data.read_pairs(path, 19)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError):
        with data.replacing(path) as file:
            file.write("half")
            raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with data.replacing(path) as file:
        file.write("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
