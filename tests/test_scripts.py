"""The scripts end to end with tiny flags, what they say of bad input, and the Makefile."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import evaluate
import train_dpo
import train_sft
from data import measure
from model import answers_to, load_checkpoint, logratios_of
from plots import figures

ROOT = Path(__file__).parent.parent
LABELS = {"sft": "SFT", "dpo_offline": "offline", "dpo_offline_kl": "offline + KL"}
LABELS |= {"dpo": "mistakes"}  # by file
TINY = "--depth 1 --width 16 --heads 2 --max-sum 20 --batch-size 32"


def run(script, flags):
    script.main(script.parse_args(shlex.split(flags)))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working folder, in which all stages have run, shortly, and have been evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.setattr(train_sft, "LOOKS", 3)
        patch.setattr(train_dpo, "EVEN_LOOKS", 1)
        patch.setitem(figures.STYLE, "figure.dpi", 40)
        run(train_sft, f"{TINY} --steps 99 --lr 0.03")
        run(train_dpo, "--steps 1 --batch-size 8 --pairs offline --lr 3e-4 --out runs/b.pt")
        run(train_dpo, "--steps 2 --batch-size 8 --out runs/a.pt")
        run(evaluate, "--samples 2 --seed 3")
        Path("mine.jsonl").write_text('{"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}')
        yield


def test_all_stages_leave_checkpoints_figures_and_results_that_agree(capsys):
    """And nothing else: the logs are in the checkpoints. Models come in the order of training.

    --ask prints a line for each model and sum, and another one for a sum that no training shows.
    """
    assert set(os.listdir("runs")) == {"sft.pt", "b.pt", "a.pt"}
    assert set(os.listdir("plots")) == {"results.json", *figures.FILES}
    models = json.loads(Path("plots/results.json").read_text())["models"]
    sft, _, sft_log = load_checkpoint("runs/sft.pt")
    for name, result in zip(("sft", "b", "a"), models.values()):
        model, args, log = load_checkpoint(f"runs/{name}.pt")
        assert result["args"] == args
        drawn = answers_to(model, [n // 2 for n in range(10, 42)], generator=torch.manual_seed(3))
        held_out = [x for x in drawn if int(x.split("=")[0]) in data.held_out_sums(20)]
        assert 0 < result["sampled"]["exact"] < 1
        assert result["sampled"] == measure(drawn, 3) and result["held out"] == measure(held_out, 3)
        assert result["greedy"] == measure(answers_to(model, range(5, 21), greedy=True), 3)
        assert result["kl"] == pytest.approx(logratios_of(model, sft, drawn).mean().item())
        assert result["answers"] == answers_to(model, [20, 11, 9], generator=torch.manual_seed(3))
        wrong = [equation for equation in drawn if not data.is_exact(equation)]
        assert result["wrong"] == random.Random(3).sample(wrong, 3)
    assert [record["step"] for record in log if "own" in record] == [0, 1, 2]
    assert len(sft_log) == 3 and sft_log[2]["gap"] < sft_log[0]["gap"] and result["kl"] != 0
    run(evaluate, "--ask 100,9,8 --plots-dir nowhere")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["SFT", "SFT"]
    assert [line.count("=") for line in lines] == [4, 0] * 3 + [4, 0] * 3 + [4] * 3  # 9 is held out
    assert list(models) == ["SFT", "offline", "mistakes"] and not os.path.exists("nowhere")


def files():
    return {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}


BAD = {
    train_sft: "--steps 0|--lr 1e30|--width 10|--max-sum 9|--device x|--out ''|--out runs"
    f"|--lr 1e9 {TINY} --steps 9",
    train_dpo: "--preferred-terms 6|--beta 0|--label-smoothing 0.5|--sft runs/none.pt"
    "|--sft mine.jsonl|--pairs none|--pairs runs|--loss x|--loss ipo --label-smoothing 0.1"
    "|--nll-weight -1|--beta nan|--out plots/../runs/sft.pt|--pairs mine.jsonl --out mine.jsonl"
    "|--lr 1e9 --steps 9 --pairs offline|--lr 1e9 --steps 1",
    evaluate: "--ask 0|--ask 9,x|--samples 0|runs/none.pt|plots/results.json|--plots-dir mine.jsonl"
    "|--plots-dir taken --samples 1",
}


@pytest.mark.parametrize("script, flags", [(x, f) for x in BAD for f in BAD[x].split("|")])
def test_bad_input_ends_in_one_line_and_harms_no_file(script, flags, capsys):
    os.makedirs("taken/dist.gif", exist_ok=True)  # a folder where a figure should be
    before = files()
    with pytest.raises(SystemExit) as stop:
        data.run_script(lambda: run(script, flags))
    *lines, complaint = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and ": error: " in complaint and files() == before
    assert not any("error" in line for line in lines)
    assert any(word in complaint for word in shlex.split(flags)) or "1e9" in flags
    assert ("1e9" in flags) == ("lower --lr" in complaint)


def test_the_name_of_a_source_can_be_the_name_of_a_file(capsys):
    """And a run that had no pair says so. A source of one's own is registered by its name."""
    run(train_dpo, "--pairs offline --steps 1 --batch-size 2 --out offline")
    assert load_checkpoint("offline")[1]["pairs"] == "offline"
    assert "Warning" not in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_dpo.SOURCES, "none", lambda *_: [])
        run(train_dpo, "--pairs none --steps 1 --out offline")
    assert "Warning: no step had a pair" in capsys.readouterr().out


def test_an_evaluation_of_less_says_which_figures_are_older(capsys, tmp_path):
    flags = f"--samples 1 --plots-dir {shlex.quote(str(tmp_path))}"
    run(evaluate, f"{flags} runs/a.pt")
    assert set(os.listdir(tmp_path)) == {"results.json", *figures.FILES}
    run(evaluate, f"{flags} runs/sft.pt")
    *_, last = capsys.readouterr().out.splitlines()
    assert [name for name in sorted(figures.FILES) if name in last] == ["dist.gif", "mass.png"]


def test_the_defaults_are_those_that_the_pages_speak_of():
    golden = {
        train_sft: "steps 4250, batch_size 128, lr 0.006, depth 6, width 48, heads 4, max_sum 100",
        train_dpo: "steps 500, batch_size 128, lr 0.001, preferred_terms 3, pairs mistakes,"
        " beta 0.8, loss sigmoid, label_smoothing 0.0, nll_weight 0.0, kl_weight 0.0",
        evaluate: "samples 100, plots_dir plots",
        data: "count 10, max_sum 100, preferred_terms 3",
    }
    for script, defaults in golden.items():
        args = vars(script.parse_args([]))
        for default in defaults.split(", "):
            name, value = default.split()
            assert str(args[name]) == value and args["seed"] == 0


# ---- the Makefile ----------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A fresh copy."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.tmp")
    return shutil.copytree(ROOT, tmp_path / "project", ignore=ignored)


def make(project, *targets):
    """The jobs of `make -n`: install, the label of a model or evaluate; all words it prints."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MA")}
    env |= {"STEPS": "1000", "SAMPLES": "5"}  # of the user's own
    command, jobs = ["make", "-n", "--no-print-directory", *targets], []
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if script := re.match(r"\.venv/bin/python (train_sft|train_dpo|evaluate)\.py (.*)", line):
            args = vars(sys.modules[script[1]].parse_args(shlex.split(script[2])))
            jobs.append(evaluate.label_of(args) if "out" in args else "evaluate")
            assert jobs[-1] == LABELS.get(Path(args.get("out", "")).stem, "evaluate")
        jobs += ["install"] * ("pip install" in line)
    return jobs, done.stdout.split()


def test_make_trains_what_is_missing_and_evaluates_it(project):
    everything = ["install", *LABELS.values(), "evaluate"]
    assert make(project)[0] == everything
    jobs, words = make(project, "quick")
    assert jobs == everything and "plots" not in words
    assert all(".venv/" in word or "runs/quick" in word for word in words if "/" in word)
    for name in (".venv/installed", *(f"runs/{name}.pt" for name in LABELS if name != "dpo")):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    assert make(project)[0] == ["mistakes", "evaluate"]


def test_clean_keeps_the_study_and_a_failure_keeps_the_results(project):
    made = [f"runs/{name}.pt" for name in LABELS]
    kept = [".venv/installed", "runs/study/1/sft_0.pt", "runs/try.pt", "plots/results.json"]
    for name in made + kept[:3]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    python = project / ".venv/bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\ntouch plots/results.json; exit 1\n")
    python.chmod(0o755)
    assert subprocess.run(["make"], cwd=project, capture_output=True).returncode == 2
    subprocess.run(["make", "clean"], cwd=project, check=True, stdout=subprocess.DEVNULL)
    assert [name for name in made + kept if (project / name).exists()] == kept
