"""Tokens, parser, metrics, the generator against closed forms, files of pairs, errors and flags."""

import argparse
import contextlib
import io
import math
import os
import resource
import shlex
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest

import data
from data import CUT_OFF, END

GOOD = '{"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}'
FOUR = GOOD.replace("3+3+3", "3+3+2+1")


def test_tokens_and_masks_by_hand():
    """A completion starts in column 4 and is masked up to its own end token."""
    assert data.encode("0123456789+=") == list(range(12)) and (END, data.VOCAB_SIZE) == (12, 13)
    assert data.decode([4, 10, 5, END, 7]) == "4+5" and data.decode([END, 1]) == ""
    assert data.decode([4, 10, 5]) == "4+5" + CUT_OFF and data.decode([]) == CUT_OFF
    tokens, mask = data.collate([("9=", "4+5"), ("100=", "0"), ("10=", ""), ("7=", "60" + CUT_OFF)])
    rows = [0, 0, 9, 11, 4, 10, 5, END], [1, 0, 0, 11, 0, END, END, END]
    rows += [0, 1, 0, 11, END, END, END, END], [0, 0, 7, 11, 6, 0, END, END]
    assert tokens.tolist() == list(rows)
    rows = "....xxxx", "....xx..", "....x...", "....xx.."
    assert mask.tolist() == [[x == "x" for x in row] for row in rows]
    assert [x.shape for x in data.collate([])] == [(0, 4), (0, 4)]


def test_what_the_model_cannot_read_is_refused():
    prompts = "1000=", "x=", "=", "", "9", "9=4", "-9=", " 9=", "9=\n", "٩="
    completions = "4-5", "4 5", "４+5", "4+5\n", f"{CUT_OFF}4"
    for bad in [(x, "4+5") for x in prompts] + [("9=", x) for x in completions]:
        with pytest.raises(ValueError):
            data.collate([("9=", "4+5"), bad])


def test_parse_takes_equations_right_or_wrong_and_nothing_else():
    assert data.parse("43=10+30+3") == (43, [10, 30, 3]) and data.parse("9=9") == (9, [9])
    assert data.parse("9=3+3+4") == (9, [3, 3, 4]) and data.parse("5=1+1+1+1+1+1") == (5, [1] * 6)
    bad = "|9|9=|=4+5|9=+|9=4+|9=+4|9=4++5|9=4+5=9|9=4+05|9=0+9|09=4+5|9=4+5\n| 9=4+5|9=4-5|9=(4)+5"
    for text in f"{bad}|9=4+5;1|9=4+٥|9=4.0+5|9=1e1|9=4+5{CUT_OFF}|1={CUT_OFF}".split("|"):
        assert data.parse(text) is None and not data.is_exact(text)
        assert not data.is_preferred(text, 2) and data.mark(text, 2)[0] == "✗"


def test_metrics_by_hand():
    """Of nine answers four are exact, two of them alike; three are off; two are no equations."""
    exact, off = ["9=3+3+3", "9=3+3+3", "9=4+5", "9=9"], ["9=4+6", "12=3+3+3", "9=1+1"]
    metrics = data.measure(exact + off + ["9=", "9=4+5" + CUT_OFF], 3)
    assert metrics.pop("counts") == {"1": 1 / 9, "2": 3 / 9, "3": 3 / 9}
    assert metrics.pop("exact_counts") == {"1": 1 / 9, "2": 1 / 9, "3": 2 / 9}
    mean = {"n": 9, "mae": (1 + 3 + 7) / 7}
    assert metrics == mean | {"parse_rate": 7 / 9, "exact": 4 / 9, "preferred": 2 / 9}
    assert data.measure(["9=", "x"], 3)["mae"] is None
    parts = ["✓ 9=3+3+3", "✓ 9=3+3+3", "2 terms", "1 terms", "+1", "-3", "-7"]
    for x, part in zip(exact + off, parts):
        assert part in data.mark(x, 3) and data.mark(x, 3)[0] == "✗✓"[data.is_exact(x)]
        assert (data.is_exact(x), data.is_preferred(x, 3)) == (x in exact, x == "9=3+3+3")


def is_uniform(drawn, every, bound):
    """Whether just these were drawn, and pass a chi-square test; bounds are for p = 0.001."""
    counts, mean = Counter(drawn), len(drawn) / len(every)
    return set(counts) == set(every) and sum((counts[x] - mean) ** 2 for x in every) < bound * mean


def test_sums_and_term_counts_are_uniform_and_independent():
    seen = data.seen_sums()
    examples = data.random_equations(Random(1), 60_000, seen)
    both = [(int(prompt[:-1]), completion.count("+") + 1) for prompt, completion in examples]
    assert all(data.is_exact("".join(example)) for example in examples)
    assert is_uniform([n for n, _ in both], seen, 131.0)
    assert is_uniform([k for _, k in both], (2, 3, 4, 5), 16.27)
    assert is_uniform(both, list(product(seen, (2, 3, 4, 5))), 429.7)


@pytest.mark.parametrize("n, k, bound", [(5, 5, 1), (12, 2, 29.6), (11, 4, 172.4)])
def test_compositions_are_uniform(n, k, bound):
    """Every composition is listed from its cut points."""
    edges = [(0, *cuts, n) for cuts in combinations(range(1, n), k - 1)]
    every = ["+".join(str(b - a) for a, b in zip(row, row[1:])) for row in edges]
    rng = Random(2)
    assert is_uniform([data.composition(rng, n, k) for _ in range(200 * len(every))], every, bound)


def test_entropy_floor_equals_a_plain_loop_over_the_ways_to_split_a_sum():
    ways = {(n, 1): 1 for n in range(1, 101)}  # of n into k terms, by the value of the last one
    for k, n in product((2, 3, 4, 5), range(1, 101)):
        ways[n, k] = sum(ways[n - last, k - 1] for last in range(1, n))
    for sums, floor in ((range(5, 101), 9.179), (data.seen_sums(), 9.163)):
        kinds = list(product(sums, (2, 3, 4, 5)))
        expected = sum(math.log(4 * ways[kind]) for kind in kinds) / len(kinds)
        got = data.entropy_floor([f"{n}=" + "1+" * (k - 1) + f"{n - k + 1}" for n, k in kinds])
        assert got == pytest.approx(expected) == pytest.approx(floor, abs=5e-4)


@pytest.mark.parametrize("max_sum", [20, 100, 999])
def test_held_out_sums_are_spread_and_all_other_sums_are_seen(max_sum):
    held_out, seen = data.held_out_sums(max_sum), data.seen_sums(max_sum)
    assert len(set(held_out)) == 10 and sorted(held_out + seen) == list(range(5, max_sum + 1))
    edges = [5, *held_out, max_sum]
    assert max(b - a for a, b in zip(edges, edges[1:])) <= math.ceil((max_sum - 5) / 10)


def test_golden_sums_and_lengths():
    assert data.held_out_sums() == [11, 20, 30, 39, 49, 58, 68, 77, 87, 96]
    assert data.shown_sums() == [100, 57, 43]
    longest = "20+20+20+20+20", "199+200+200+200+200"  # of the sums up to 100, and up to 999
    assert [data.longest_completion(n) for n in (100, 999)] == [len(x) for x in longest]


@pytest.mark.parametrize("preferred", data.TERM_COUNTS)
def test_pairs_are_right_and_rejected_has_each_other_number_of_terms_equally_often(preferred):
    seen, sums, counts = data.seen_sums(), [], []
    for x, chosen, rejected in data.random_pairs(Random(4), 3000, seen, preferred):
        assert data.is_preferred(x + chosen, preferred) and data.is_exact(x + rejected)
        sums.append(int(x[:-1]))
        counts.append(rejected.count("+") + 1)
    assert is_uniform(sums, seen, 131.0)
    assert is_uniform(counts, {2, 3, 4, 5} - {preferred}, 13.82)


def printed(flags, capsys):
    data.main(data.parse_args(flags.split()))
    return capsys.readouterr().out


def test_pairs_on_the_command_line_can_be_read_back(tmp_path, capsys):
    """And a line with a remark; in its string JSON allows other line ends than its own."""
    lines = printed("--pairs --count 7 --seed 5 --preferred-terms 4", capsys)
    path, remark = tmp_path / "pairs.jsonl", FOUR[:-1] + ', "remark": "\u2028 \u0085"}'
    path.write_text(lines + "\r\n\n" + remark, encoding="utf-8-sig")
    expected = data.random_pairs(Random(5), 7, data.seen_sums(), 4)
    assert data.read_pairs(path, 100, 4) == [*expected, ("9=", "3+3+2+1", "4+5")]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [1, 2])
def test_a_warning_counts_pairs_that_teach_something_else(tmp_path, capsys, number):
    """Of sums that training never shows, of no equations, and of chosen sides not preferred."""
    path = tmp_path / "pairs.jsonl"
    unseen, no_sum = GOOD.replace("9=", "11="), GOOD.replace("4+5", "+")
    too_large, swapped = GOOD.replace("9=", "200="), GOOD.replace("3+3+3", "5+4")
    wrong = GOOD.replace("3+3+3", "3+3+4")
    for bad, chosen in ((unseen, 1), (no_sum, 0), (too_large, 1), (swapped, 1), (wrong, 1)):
        path.write_text("\n".join([GOOD] * 5 + [bad] * number))
        assert len(data.read_pairs(path, 100, 3)) == 5 + number
        warnings = capsys.readouterr().out
        assert (f" {number} of {5 + number} chosen sides" in warnings) == bool(chosen)
        assert (f" {number} of {5 + number} pairs" in warnings) == (bad not in (swapped, wrong))


BAD = ["{", "[" * 100_000, "1" * 5000, "[1, 2]", "null", '{"prompt": "9=", "chosen": "3+3+3"}']
BAD += [GOOD.replace("4+5", x) for x in ("3+3+3", "9=4+5", "4+5\\n", "4-5", "1+" * 7 + "1", "…")]
BAD += [GOOD.replace('"4+5"', x) for x in ('["4+5"]', "45", "null")]
BAD += [GOOD.replace('"9="', x) for x in ('"9"', '"09="', '"1000="', '"9=\\n"', "9", '"="')]


def test_unusable_pairs_are_named_by_file_and_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for line in BAD:
        path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
        with pytest.raises(data.InputError) as error:
            data.read_pairs(path, 100, 3)
        assert f"{path}, line 3 " in str(error.value) and "\n" not in str(error.value), line
    for content in (b"", b"\n\n", b"\xff\xfe", b"\xff" + GOOD.encode()):
        path.write_bytes(content)
        with pytest.raises(data.InputError):
            data.read_pairs(path, 100, 3)
    path.write_text(GOOD.replace("4+5", "1+" * 6 + "11"))  # exactly as long as there is room for
    assert data.read_pairs(path, 100, 3) == [("9=", "3+3+3", "1+" * 6 + "11")]


# ---- files and errors ------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_full_disk_is_noticed_and_leaves_all_files_as_they_were(tmp_path):
    """The disk has room for 1,000 bytes of 2,000."""
    for name in ("out", "out.tmp", "out.1", f"out.{os.getpid()}", f"out.{os.getpid()}.tmp"):
        (tmp_path / name).write_text("mine")
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for attempt in (lambda x: data.write_file(x, bytes(2000)), data.check_writable):
            with pytest.raises(OSError):
                attempt(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    data.check_writable(tmp_path / "out")
    data.write_file(tmp_path / "out", b"new")
    assert contents(tmp_path) == before | {"out": b"new"}


def test_what_cannot_replace_its_target_stays_under_another_name(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(data.InputError) as error:
        data.write_file(tmp_path / "out", b"hours of work")
    ((name, content),) = contents(tmp_path).items()
    assert content == b"hours of work" and str(tmp_path / name) in str(error.value)


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    """A link is followed."""
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("old"), Path("link").symlink_to("old"), os.mkdir("folder")
    os.mkfifo("fifo"), Path("kept").write_text("kept"), os.chmod("kept", 0o444)
    for path in ("link", "new", "deep/er/new"):
        data.check_writable(path)
        data.write_file(path, b"new")
    assert Path("link").is_symlink() and Path("old").read_text() == "new"
    for path in ("folder", "folder/", "", "fifo", "/dev/null", "old/below", "kept"):
        with pytest.raises((data.InputError, OSError)):
            data.check_writable(path)
    assert Path("kept").read_text() == "kept" and os.listdir("deep/er") == ["new"]
    assert set(os.listdir()) == {"old", "link", "new", "fifo", "folder", "kept", "deep"}


def test_numbers_outside_their_range_are_refused(capsys):
    for flag in ("--count=0", "--count=1e3", "--max-sum=19", "--max-sum=1000", "--seed=-1"):
        with pytest.raises(SystemExit) as error:
            data.parse_args([flag])
        assert error.value.code == 2 and flag[:6] in capsys.readouterr().err.splitlines()[-1]
    assert [data.number(float, 0, 1)(text) for text in ("0", "1e-3", "1")] == [0, 0.001, 1]
    for text in ("nan", "inf", "1.001", "-0.001", "x", ""):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            data.number(float, 0, 1)(text)


def test_errors_of_a_script_end_in_a_status_and_one_line(capsys):
    def fail():
        raise error

    for error, status in ((data.InputError("bad"), 2), (OSError(2, "bad"), 2)):
        with pytest.raises(SystemExit) as stop:
            data.run_script(fail)
        err = capsys.readouterr().err
        assert (stop.value.code, err.count("\n")) == (status, 1) and str(error) in err
    error = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stop:
        data.run_script(fail)
    assert stop.value.code == 130 and capsys.readouterr().err.strip().count("\n") == 0


def test_output_that_nobody_reads_is_an_error_but_quiet_for_head():
    python, script = shlex.quote(sys.executable), shlex.quote(data.__file__)
    folder = os.path.dirname(data.__file__)
    code = "import data; data.run_script(lambda: print('x' * 10**6))"
    for command, status, lines in (
        (f"{python} {script} --count 9999 | head -n 1", 0, 0),
        (f'{python} -c "{code}" | true; exit ${{PIPESTATUS[0]}}', 2, 1),
    ):
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (status, lines), done.stderr


def test_a_script_can_print_in_a_notebook_and_on_an_ascii_terminal(monkeypatch):
    """The streams of a notebook are no files, and have no method `reconfigure`."""
    notebook, terminal = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (notebook, terminal):
        monkeypatch.setattr(sys, "stderr", stream)
        with contextlib.redirect_stdout(stream):
            data.run_script(lambda: print("✓ 9=4+5"))
    assert notebook.getvalue() == "✓ 9=4+5\n"
    assert terminal.buffer.getvalue() == b"? 9=4+5\n"
