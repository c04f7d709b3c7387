"""The real scripts, end to end with tiny flags, and what they say of bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import train_dpo
import train_sft
from data import InputError

ROOT = Path(__file__).parent.parent
TINY = ["--depth", "2", "--width", "16", "--heads", "2", "--batch-size", "32"]


def run(script, *arguments):
    script.main(script.parse_args([str(argument) for argument in arguments]))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which SFT, online DPO and offline DPO have run, shortly, and been evaluated."""
    folder = tmp_path_factory.mktemp("project")
    before = os.getcwd()
    os.chdir(folder)
    try:
        run(train_sft, *TINY, "--steps", 60)
        run(train_dpo, "--steps", 4, "--batch-size", 16)
        run(
            train_dpo,
            "--steps",
            4,
            "--batch-size",
            16,
            "--pairs",
            "offline",
            "--out",
            "runs/dpo_offline.pt",
        )
        run(evaluate, "--samples", 2)
        yield folder
    finally:
        os.chdir(before)


def test_the_pipeline_leaves_checkpoints_logs_results_and_figures(folder):
    runs = {path.name for path in (folder / "runs").iterdir()}
    assert runs == {
        f"{name}.{end}" for name in ("sft", "dpo", "dpo_offline") for end in ("pt", "jsonl")
    }
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert {
        "results.json",
        "sft_dist.png",
        "dpo_dist.png",
        "dist.png",
        "sft_loss.png",
        "dpo_curves.png",
    } <= plots

    sft_log = evaluate.read_log(folder / "runs" / "sft.pt")
    assert sft_log[-1]["gap"] < sft_log[0]["gap"] and sft_log[-1]["equations"] == 60 * 32
    dpo_log = evaluate.read_log(folder / "runs" / "dpo.pt")
    assert [record["step"] for record in dpo_log] == [0, 1, 2, 3, 4]
    assert dpo_log[0]["own/kl"] == 0 and dpo_log[4]["own/kl"] != 0
    # At the first step policy and reference agree: no reward, and a loss of log 2.
    assert dpo_log[1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert dpo_log[1]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    for r in dpo_log[1:]:
        assert r["rewards/margins"] == pytest.approx(
            r["rewards/chosen"] - r["rewards/rejected"], abs=1e-5
        )


def test_results_are_consistent(folder):
    models = json.loads((folder / "plots" / "results.json").read_text())["models"]
    assert list(models) == ["sft", "dpo_offline", "dpo"]
    for result in models.values():
        assert {"kl", "kl_se", "seconds", "seed"} <= set(result)
        for decoding, per_sum in (("greedy", 1), ("sampled", 2)):
            splits = result[decoding]
            assert {split: metrics["n"] for split, metrics in splits.items()} == {
                "all": 96 * per_sum,
                "seen": 86 * per_sum,
                "held_out": 10 * per_sum,
            }
            for metrics in splits.values():
                assert sum(metrics["counts"].values()) == pytest.approx(metrics["parse_rate"])
                assert sum(metrics["exact_counts"].values()) == pytest.approx(metrics["exact"])
                assert metrics["preferred"] == metrics["counts"].get("3", 0)
    assert models["sft"]["kl"] == 0 and models["sft"]["gap"] > 0
    assert models["dpo"]["kl"] != 0 and models["dpo"]["kl"] > -3 * models["dpo"]["kl_se"]


def test_replot_needs_nothing_but_the_json(folder, tmp_path):
    for name in ("results.json", "logs.json"):
        (tmp_path / name).write_bytes((folder / "plots" / name).read_bytes())
    run(evaluate, "--replot", "--plots-dir", tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in (folder / "plots").glob("*.png")} and len(drawn) > 4


def test_seeds_and_readme_tables(folder, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- results -->\nold\n<!-- end results -->\n"
        "<!-- seeds -->\n<!-- end seeds -->\nafter\n"
    )
    run(
        evaluate,
        "--samples",
        2,
        "--plots-dir",
        tmp_path,
        "--seeds",
        "plots/results.json",
        "--readme",
        readme,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    exact = results["models"]["sft"]["sampled"]["all"]["exact"]
    assert results["seeds"]["models"]["sft"]["exact"] == [exact, 0.0, 2]  # the same run twice
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    assert evaluate.results_table(results) in text and evaluate.seeds_table(results) in text


def test_first_terms_by_hand():
    """Right answers of three terms alone, each sum with the same weight."""
    answers = ["9=4+5", "9=3+3+3", "9=3+2+4", "9=4+4+4", "9=", "30=10+10+10"]
    assert [n for n, share in enumerate(evaluate.first_terms(answers, 30, 3)) if share] == [3, 10]
    any_count = evaluate.first_terms(answers, 30)
    assert [any_count[n] for n in (3, 4, 10)] == pytest.approx([1 / 3, 1 / 6, 1 / 2])
    assert evaluate.one_digit(any_count) == pytest.approx(1 / 2)
    assert evaluate.first_terms(answers, 30, 5) is None
    assert evaluate.total_variation([0.5, 0.5, 0], [0.25, 0.25, 0.5]) == 0.5
    log = [{"own/preferred": 0.2, "own/kl": 1.0}, {}, {"own/preferred": 0.98, "own/kl": 2.0}]
    assert evaluate.kl_on_passing(log) == 2.0 and evaluate.kl_on_passing(log[:2]) is None


def test_measure_by_hand():
    """Five answers: right, off by 2, right with other terms, no equation, cut off."""
    metrics = evaluate.measure(["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5…"], 3)
    assert metrics == {
        "parse_rate": 0.6,
        "mae": pytest.approx(2 / 3),
        "exact": 0.4,
        "preferred": 0.4,
        "counts": {"2": 0.2, "3": 0.4},
        "exact_counts": {"2": 0.2, "3": 0.2},
        "n": 5,
    }
    assert evaluate.measure(["9=+"], 3)["mae"] is None


def test_same_seed_same_checkpoint(folder, tmp_path):
    for seed, out in ((0, "a.pt"), (1, "b.pt")):
        run(train_sft, *TINY, "--steps", 60, "--seed", seed, "--out", tmp_path / out)
    assert equal_weights(weights(tmp_path / "a.pt"), weights("runs/sft.pt"))
    assert not equal_weights(weights(tmp_path / "b.pt"), weights("runs/sft.pt"))

    for seed, out in ((0, "c.pt"), (1, "d.pt")):
        run(train_dpo, "--steps", 4, "--batch-size", 16, "--seed", seed, "--out", tmp_path / out)
    assert equal_weights(weights(tmp_path / "c.pt"), weights("runs/dpo.pt"))
    assert not equal_weights(weights(tmp_path / "d.pt"), weights("runs/dpo.pt"))


def test_two_processes_train_one_model(folder, tmp_path):
    """Process 0 draws what a run alone with half the batch draws; the other's gradients differ."""

    def torchrun(script, *arguments):
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, "-m", *launcher, ROOT / script, *map(str, arguments)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    together, alone, dpo = (tmp_path / f"{name}.pt" for name in ("together", "alone", "dpo"))
    torchrun("train_sft.py", *TINY, "--steps", 3, "--out", together)
    run(train_sft, *TINY, "--batch-size", 16, "--steps", 3, "--out", alone)
    head, head_alone = (weights(path)["head.weight"] for path in (together, alone))
    assert (head - head_alone).abs().max() > 1e-3  # rounding alone stays far below
    assert evaluate.read_log(together)[-1]["equations"] == 3 * 32

    torchrun("train_dpo.py", "--sft", together, "--steps", 2, "--batch-size", 16, "--out", dpo)
    assert weights(dpo).keys() == weights(alone).keys()
    assert evaluate.read_log(dpo)[-1]["pairs"] == 2 * 16  # no answer is preferred so soon


def test_pairs_from_a_file(folder, tmp_path):
    run(data, "--pairs", "--count", 40, "--out", tmp_path / "pairs.jsonl")
    run(
        train_dpo,
        "--steps",
        3,
        "--batch-size",
        16,
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "f.pt",
    )
    assert not equal_weights(weights(tmp_path / "f.pt"), weights("runs/sft.pt"))


def test_ask_prints_an_answer_of_every_model(folder, capsys):
    run(evaluate, "--ask", 100, 57)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sft", "dpo_offline", "dpo"] * 2
    assert all("100=" in line for line in lines[:3]) and all("57=" in line for line in lines[3:])


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        (train_sft, ["--steps", "0"], "--steps: '0' is not an integer from 1"),
        (train_sft, ["--lr", "nan"], "--lr: 'nan' is not a number above 0"),
        (train_sft, ["--width", "10"], "--width 10 is not a multiple of --heads 4"),
        (train_sft, ["--max-sum", "12"], "--max-sum: '12' is not an integer from 20 to 999"),
        (train_sft, ["--device", "cuda:77"], "--device cuda:77 is not there"),
        (train_sft, ["--steps", "1", "--out", "/dev/null/sft.pt"], "cannot write /dev/null/sft"),
        (
            train_sft,
            [*TINY, "--steps", "50", "--lr", "1e30", "--out", "runs/sft.pt"],
            "runs/sft.pt is not touched",
        ),
        (
            train_dpo,
            ["--preferred-terms", "6"],
            "--preferred-terms: '6' is not an integer from 2 to 5",
        ),
        (train_dpo, ["--sft", "runs/none.pt"], "there is no checkpoint runs/none.pt"),
        (train_dpo, ["--pairs", "runs/none.jsonl"], "cannot read the pairs file runs/none.jsonl"),
        (train_dpo, ["--beta", "-1"], "--beta: '-1' is not a number above 0"),
        (
            train_dpo,
            ["--lr", "1e30", "--steps", "50", "--out", "runs/dpo.pt"],
            "runs/dpo.pt is not touched",
        ),
        (evaluate, ["--ask", "101"], "--ask 101 is out of range"),
        (evaluate, ["--ask", "ten"], "invalid int value"),
        (
            evaluate,
            ["--samples", "1", "--plots-dir", "/dev/null/plots"],
            "cannot write /dev/null/plots",
        ),
        (evaluate, ["runs/sft.pt", "./runs/sft.pt"], "two checkpoints have the same file name"),
    ],
)
def test_bad_input_is_one_clear_line_and_harms_nothing(folder, script, arguments, complaint):
    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    with pytest.raises(InputError) as error:
        run(script, *arguments)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert contents() == before


def test_exit_status_of_bad_input_is_2_without_traceback(folder):
    for script in ("data.py --count x", "train_dpo.py --sft none.pt", "evaluate.py --ask 3"):
        process = subprocess.run(
            [sys.executable, ROOT / script.split()[0], *script.split()[1:]],
            capture_output=True,
            text=True,
        )
        assert process.returncode == 2 and process.stdout == ""
        assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(
            f"{script.split()[0]}: error: "
        )
