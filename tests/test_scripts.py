"""The real scripts, end to end with tiny flags, and what they say of bad input."""

import json
import os
import signal
import subprocess
import sys
import time
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
SHORT = ["--steps", "4", "--batch-size", "16"]


def run(script, *arguments):
    script.main(script.parse_args([str(argument) for argument in arguments]))


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def equal_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which all stages have run, shortly, and have been evaluated."""
    folder = tmp_path_factory.mktemp("project")
    before = os.getcwd()
    os.chdir(folder)
    try:
        run(train_sft, *TINY, "--steps", 60)
        run(train_dpo, *SHORT)
        run(train_dpo, *SHORT, "--pairs", "offline", "--out", "runs/dpo_offline.pt")
        run(evaluate, "--samples", 2)
        yield folder
    finally:
        os.chdir(before)


def test_the_pipeline_leaves_checkpoints_logs_results_and_figures(folder):
    runs = {path.name for path in (folder / "runs").iterdir()}
    names = ("sft", "dpo", "dpo_offline")
    assert runs == {f"{name}.{end}" for name in names for end in ("pt", "jsonl")}
    plots = {path.name for path in (folder / "plots").iterdir()}
    figures = {"dist.png", "sft_gap.png", "dpo_curves.png", "mass.png", "tokens.png"}
    assert plots == {"results.json", "logs.json"} | figures


def test_logs_say_what_the_steps_did(folder):
    sft_log = evaluate.read_log("runs/sft.pt")
    assert sft_log[-1]["gap"] < sft_log[0]["gap"] and sft_log[-1]["equations"] == 60 * 32
    log = evaluate.read_log("runs/dpo.pt")
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4]
    assert log[0]["own/kl"] == 0 and log[4]["own/kl"] != 0
    # At the first step policy and reference agree: no reward, and a loss of log 2.
    assert log[1]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert log[1]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    for r in log[1:]:
        margin = r["rewards/chosen"] - r["rewards/rejected"]
        assert r["rewards/margins"] == pytest.approx(margin, abs=1e-5)


def test_results_are_consistent(folder):
    results = json.loads((folder / "plots" / "results.json").read_text())
    models = results["models"]
    assert list(models) == ["sft", "dpo_offline", "dpo"] and len(results["p"]) == 96
    for result in models.values():
        for decoding, per_sum in (("greedy", 1), ("sampled", 2)):
            splits = result[decoding]
            numbers = {split: metrics["n"] for split, metrics in splits.items()}
            assert numbers == {"all": 96 * per_sum, "seen": 86 * per_sum, "held_out": 10 * per_sum}
            for metrics in splits.values():
                assert sum(metrics["counts"].values()) == pytest.approx(metrics["parse_rate"])
                assert sum(metrics["exact_counts"].values()) == pytest.approx(metrics["exact"])
        kl = {part: mean for part, (mean, _) in result["kl"].items()}
        parts = kl["needed"] + kl["preferred"] + kl["others"]
        assert parts == pytest.approx(kl["total"], abs=1e-9)
    assert models["sft"]["kl"]["total"][0] == 0 and models["sft"]["gap"] > 0
    assert models["dpo"]["kl"]["total"][0] != 0


def test_same_seed_same_checkpoint_and_where_it_is(folder, tmp_path, capsys):
    for script, flags, name in ((train_sft, (*TINY, "--steps", 60), "a"), (train_dpo, SHORT, "b")):
        run(script, *flags, "--out", tmp_path / f"{name}.pt")
        where = f"The model is in {tmp_path}/{name}.pt, its log in {tmp_path}/{name}.jsonl.\n"
        assert capsys.readouterr().out.endswith(where)
    assert equal_weights(weights(tmp_path / "a.pt"), weights("runs/sft.pt"))
    assert equal_weights(weights(tmp_path / "b.pt"), weights("runs/dpo.pt"))


def test_ask_prints_an_answer_of_every_model(folder, capsys):
    run(evaluate, "--ask", 100, 4)
    lines = capsys.readouterr().out.splitlines()
    names = ["sft", "dpo_offline", "dpo"]
    assert [line.split()[0] for line in lines] == [*names, "4", *names]
    assert all("100=" in line for line in lines[:3]) and all("4=" in line for line in lines[4:])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        (train_sft, "--steps 0", "--steps"),
        (train_sft, "--lr nan", "--lr"),
        (train_sft, "--width 10", "--width 10 is not a multiple of --heads 4"),
        (train_sft, "--max-sum 12", "12 is not from 20 to 999"),
        (train_sft, "--seed 4294967296", "--seed"),
        (train_dpo, "--preferred-terms 6", "--preferred-terms"),
        (train_dpo, "--beta -1", "--beta"),
        (train_dpo, "--out runs/sft.pt", "would replace a file of --sft or --pairs"),
        (train_dpo, "--out runs/sft.ckpt", "would replace a file of --sft or --pairs"),
        (train_dpo, "--pairs mine.jsonl --out mine.pt", "would replace a file of --sft or"),
        (evaluate, "--ask 0", "--ask"),
        (evaluate, "--ask -3", "--ask"),
        (evaluate, "--samples 1", "--samples is at least 2"),
        (evaluate, "--ask 1000", "--ask takes sums up to 999"),
    ],
)
def test_bad_flags_end_with_status_2(folder, capsys, script, arguments, complaint):
    before = contents(folder)
    with pytest.raises(SystemExit) as exit:
        run(script, *arguments.split())
    assert exit.value.code == 2 and complaint in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        (train_sft, "--device cuda:77", "--device cuda:77 is not there"),
        (train_sft, "--device meta", "--device meta is not there"),
        (train_sft, "--steps 1 --out /dev/null/sft.pt", "cannot write /dev/null/sft"),
        (train_sft, "--steps 1 --out runs/x.jsonl", "the log would have the same name"),
        (train_sft, f"{' '.join(TINY)} --steps 50 --lr 1e30", "not finite at step"),
        (train_sft, f"{' '.join(TINY)} --steps 2 --lr 1e30", "not finite at step 2"),
        (train_dpo, "--sft runs/none.pt", "there is no checkpoint runs/none.pt"),
        (train_dpo, "--pairs runs/none.jsonl", "cannot read the pairs file runs/none.jsonl"),
        (train_dpo, "--lr 1e30 --steps 50", "not finite at step"),
        (evaluate, "--samples 2 --plots-dir /dev/null/plots", "cannot write /dev/null/plots"),
        (evaluate, "runs/sft.pt ./runs/sft.pt", "two checkpoints have the same file name"),
    ],
)
def test_bad_input_is_one_clear_line_and_harms_nothing(folder, script, arguments, complaint):
    before = contents(folder)
    with pytest.raises(InputError) as error:
        run(script, *arguments.split())
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert contents(folder) == before


def test_data_prints_equations_and_pairs(capsys):
    run(data, "--count", 5)
    run(data, "--count", 5, "--pairs", "--preferred-terms", 4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(data.is_exact(line) for line in lines[:5])
    for pair in map(json.loads, lines[5:]):
        assert data.is_preferred(pair["prompt"] + pair["chosen"], 4)


def test_a_run_that_is_ended_leaves_what_was_there(folder, tmp_path):
    """SIGTERM in the middle of a run: exit status 130, no temporary file, the old model whole."""
    out = tmp_path / "sft.pt"
    out.write_bytes(b"the old model")
    command = [sys.executable, ROOT / "train_sft.py", *TINY, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while not list(tmp_path.glob("*.tmp")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"the old model"


def test_bad_input_gives_status_2_without_a_traceback(folder):
    command = [sys.executable, ROOT / "train_dpo.py", "--sft", "none.pt"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("train_dpo.py: error: there is no checkpoint none.pt")
    assert len(process.stderr.splitlines()) == 1
