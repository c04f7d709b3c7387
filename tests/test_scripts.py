"""The scripts end to end with tiny flags, what they say of bad input, and the Makefile."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data
import evaluate
import train_dpo
import train_sft
from model import GPT, GPTConfig, fingerprint, load_checkpoint, save_checkpoint
from plots import figures

ROOT = Path(__file__).parent.parent
MODELS = ["sft", "dpo_offline", "dpo_offline_nll", "dpo"]
TINY = "--depth 1 --width 16 --heads 2 --max-sum 20 --batch-size 32"


def run(script, flags):
    script.main(script.parse_args(shlex.split(flags)))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The working folder, in which all stages have run, shortly, and have been evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.setattr(train_sft, "LOOKS", 6)
        patch.setattr(train_dpo, "EVEN_LOOKS", 3)
        patch.setitem(figures.STYLE, "figure.dpi", 40)
        run(train_sft, f"{TINY} --steps 60 --lr 0.02")
        run(train_dpo, "--steps 24 --batch-size 8")
        run(train_dpo, "--steps 4 --batch-size 8 --pairs offline --out runs/dpo_offline.pt")
        run(evaluate, "--samples 2")
        Path("mine.jsonl").write_text('{"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"}')
        yield


def read_log(name, key):
    lines = Path(f"runs/{name}.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def contents():
    return {path: hash(path.read_bytes()) for path in Path().rglob("*.*") if path.is_file()}


def test_logs_say_what_the_steps_did():
    log = read_log("sft", "gap")
    assert [r["step"] for r in log] == [*range(10, 61, 10)] and log[-1]["gap"] < log[0]["gap"]
    looks = read_log("dpo", "own")
    assert [r["step"] for r in looks] == [0, 1, 2, 4, 8, 16, 24]
    assert looks[0]["own"]["kl"] == 0 != looks[-1]["own"]["kl"]
    for name in ("dpo", "dpo_offline"):
        steps = read_log(name, "loss")
        assert steps[-1]["rewards/margins"] != 0 == pytest.approx(steps[0]["rewards/margins"])
        margins = [r["rewards/chosen"] - r["rewards/rejected"] for r in steps]
        assert [r["rewards/margins"] for r in steps] == pytest.approx(margins, abs=1e-4)
    # Policy and reference agree at first, so the loss of each of the 8 pairs is log 2.
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and steps[-1]["pairs"] == 4 * 8


def test_all_stages_leave_checkpoints_logs_figures_and_results_that_agree():
    names = ("sft", "dpo", "dpo_offline")
    assert set(os.listdir("runs")) == {x + end for x in names for end in (".pt", ".jsonl")}
    drawn = {"dist.png", "dist.gif", "sft_gap.png", "mass.png"}
    assert set(os.listdir("plots")) == {"results.json", *drawn}
    results = json.loads(Path("plots/results.json").read_text())
    assert list(results["models"]) == ["sft", "dpo_offline", "dpo"]
    for name, result in results["models"].items():
        for kind, number in (("sampled", 16 * 2), ("held out", 10 * 2), ("greedy", 16)):
            assert (metrics := result[kind])["n"] == number
            assert sum(metrics["counts"].values()) == pytest.approx(metrics["parse_rate"])
            assert sum(metrics["exact_counts"].values()) == pytest.approx(metrics["exact"])
        assert result["seconds"] == read_log(name, "seconds")[-1]["seconds"]
    assert results["models"]["sft"]["kl"] == 0 != results["models"]["dpo"]["kl"]


@pytest.mark.parametrize("script, flags", [(train_sft, TINY), (train_dpo, "--batch-size 8")])
def test_a_seed_gives_one_checkpoint_and_every_name_has_its_own_log(script, flags, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(script, f"{flags} --steps 3 --seed {seed} --out {tmp_path}/{name}.pt")
    a, b, c = (fingerprint(load_checkpoint(tmp_path / f"{x}.pt")[0]) for x in "abc")
    assert a == b != c
    for name in ("beta0.1", "beta0.8"):
        run(script, f"{flags} --steps 1 --out {tmp_path}/{name}")
        assert {f"{name}.jsonl", name} < set(os.listdir(tmp_path))


def test_ask_prints_a_line_a_model_a_sum(capsys):
    run(evaluate, "--ask 100,57 --plots-dir nowhere")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sft", "dpo_offline", "dpo"] * 2
    assert all(line.count("100=") == 4 for line in lines[:3]) and not os.path.exists("nowhere")
    assert all(line.count(" 57=") == 4 for line in lines[3:])
    run(evaluate, "--ask 57 runs/dpo.pt")
    assert capsys.readouterr().out.splitlines() == lines[5:]


def refused(script, flags, capsys):
    """The line in which a script complains, after which all files are as before."""
    before = contents()
    with pytest.raises(SystemExit) as stop:
        data.run_script(lambda: run(script, flags))
    *lines, complaint = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and ": error: " in complaint and contents() == before
    assert not any("error" in line for line in lines)
    return complaint


BAD = {
    train_sft: "--steps 0|--lr 1e30|--width 10|--max-sum 9|--seed -1|--device x|--out ''|--out runs"
    f"|--out /dev/null/x.pt|--out /dev/null|--lr 1e9 {TINY} --steps 9",
    train_dpo: "--preferred-terms 6|--beta 0|--label-smoothing 0.5|--loss x|--sft runs/none.pt"
    "|--sft mine.jsonl|--pairs none|--pairs runs|--pairs ''|--lr 1e9 --steps 1|--out ''|--out runs"
    "|--nll-weight -1|--nll-weight inf|--label-smoothing -0.1|--beta nan|--out ./runs/sft.pt"
    "|--lr 1e9 --steps 9 --pairs mine.jsonl|--out /dev/null/x.pt|--out runs/sft.pt"
    "|--out plots/../runs/sft.pt|--out runs/sft|--pairs mine.jsonl --out mine.jsonl"
    "|--pairs mine.jsonl --out mine.pt",
    evaluate: "--ask 0|--ask 9,x|--ask 1000|--ask ''|--samples 0|runs/none.pt|runs/sft.jsonl"
    "|--plots-dir mine.jsonl|--sft runs/dpo.pt|--sft none.pt --samples 1",
}


@pytest.mark.parametrize("script, flags", [(x, f) for x in BAD for f in BAD[x].split("|")])
def test_bad_input_ends_in_one_line_and_harms_no_file(script, flags, capsys):
    complaint = refused(script, flags, capsys)
    assert any(word.removesuffix("/x.pt") in complaint for word in shlex.split(flags))
    assert ("1e9" in flags) == ("not finite" in complaint)


def test_models_of_other_tasks_or_references_are_refused(capsys, tmp_path):
    (sft, _), four = load_checkpoint("runs/sft.pt"), {"preferred_terms": 4}
    save_checkpoint(f"{tmp_path}/four.pt", sft, four, [])
    for name, max_sum in (("wide", 30), ("other", 20)):
        save_checkpoint(f"{tmp_path}/{name}.pt", GPT(GPTConfig(1, 16, 2, max_sum)), {}, [])
    for flags in ("runs/dpo.pt {0}/four.pt", "runs/sft.pt {0}/wide.pt", "--sft {0}/other.pt"):
        refused(evaluate, flags.format(tmp_path), capsys)
    assert "runs/sft.pt" in refused(evaluate, f"{tmp_path}/wide.pt", capsys)
    run(evaluate, f"runs/sft.pt {tmp_path}/four.pt --samples 1 --plots-dir {tmp_path}/plots")
    assert json.loads((tmp_path / "plots/results.json").read_text())["task"]["preferred_terms"] == 4


def test_results_of_two_files_of_one_name_even_if_a_figure_cannot_be_written(tmp_path, capsys):
    """A folder without write access is found before any answer is printed."""
    shutil.copy("runs/sft.pt", tmp_path)
    (tmp_path / "dist.png").mkdir()
    refused(evaluate, f"runs/sft.pt {tmp_path}/sft.pt --samples 1 --plots-dir {tmp_path}", capsys)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["models"]) == {"runs/sft", f"{tmp_path}/sft"}
    with pytest.raises(FileExistsError):
        run(evaluate, "--plots-dir mine.jsonl")
    assert capsys.readouterr().out == ""


def test_a_run_that_is_ended_leaves_the_old_checkpoint(tmp_path):
    """Ctrl-C in the middle of a run gives the exit status 130 and no traceback."""
    (out := tmp_path / "sft.pt").write_bytes(b"the old model")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train_sft.py", "--out", out],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.read(4) == b"\rSFT"  # the progress bar
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == [out] and out.read_bytes() == b"the old model"


def test_evaluation_for_an_ascii_terminal_leaves_the_backend_of_matplotlib(tmp_path):
    program = "import matplotlib, runpy, sys; matplotlib.use('svg'); sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__'); print(matplotlib.get_backend())"
    command = [sys.executable, "-c", program, ROOT / "evaluate.py", "runs/sft.pt"]
    command += ["--samples", "1", "--plots-dir", tmp_path]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("svg\n") and "\n    ? " in result.stdout
    assert set(os.listdir(tmp_path)) == {"results.json", "dist.png", "sft_gap.png"}


@pytest.fixture
def project(tmp_path):
    """A copy of the project without what git ignores, all of one time."""
    ignored = shutil.ignore_patterns(".*", "runs", "__pycache__", "*.tmp")
    shutil.copytree(ROOT, tmp_path / "project", ignore=ignored)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return tmp_path / "project"


def make(project, *targets):
    """The jobs of `make -n`: installed, a model or evaluate; and all words of its commands."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MA")}
    command, jobs = ["make", "-n", "--no-print-directory", *targets], []
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        if script := re.match(r"\.venv/bin/python (train_sft|train_dpo|evaluate)\.py (.*)", line):
            args = sys.modules[script[1]].parse_args(shlex.split(script[2]))
            jobs.append(Path(args.out).stem if "out" in args else "evaluate")
        jobs += ["install"] * ("pip install" in line)
    return jobs, done.stdout.split()


def test_a_fresh_copy_installs_trains_four_models_and_evaluates_them(project):
    assert make(project)[0] == ["install", *MODELS, "evaluate"]
    jobs, words = make(project, "quick")
    assert jobs == ["install", *MODELS, "evaluate"] and "plots" not in words
    assert all(".venv/" in word or "runs/quick" in word for word in words if "/" in word)


def test_only_what_is_missing_or_old_is_made_again(project):
    products = [project / f"runs/{name}.pt" for name in MODELS]
    products += [project / "runs/evaluated", project / ".venv/installed"]
    for name in ("nothing", *MODELS):
        for product in products:
            product.parent.mkdir(exist_ok=True)
            product.touch()
        (project / f"runs/{name}.pt").unlink(missing_ok=True)
        again = {"nothing": [], "sft": [*MODELS, "evaluate"]}.get(name, [name, "evaluate"])
        assert make(project)[0] == again
    products[3].touch()
    products[-1].unlink()
    (project / "plots/figures.py").touch()
    assert make(project)[0] == ["install", "evaluate"]
