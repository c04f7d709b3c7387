"""What evaluate.py names, measures, tabulates and draws, against hand-made answers and loops."""

from pathlib import Path

import pytest
from PIL import Image
from conftest import random_model

import evaluate
import train_dpo
from data import CUT_OFF, measure
from model import GPT, GPTConfig, fingerprint, save_checkpoint
from plots import figures

FIVE = ["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5" + CUT_OFF]
LONG = ["9=1+1+1+1+1+4", "9=1+1+1+1+1+1+1+1+1", "9=1+1+1+1+1+1+1+1+2", "9=", "9=2+7"]


def dpo_args(flags):
    return vars(train_dpo.parse_args(flags.split()))


LABELS = {
    "": "mistakes",
    "--steps 7 --seed 3 --lr 0.01 --beta 0.1 --preferred-terms 4 --out x.pt": "mistakes",
    "--pairs offline": "offline",
    "--pairs offline --nll-weight 0.1": "offline + NLL",
    "--pairs online --kl-weight 0.1": "online + KL",
    "--pairs reference --loss ipo": "reference, ipo",
    "--label-smoothing 0.1": "mistakes, smoothed",
}


@pytest.mark.parametrize("flags", LABELS)
def test_a_label_says_what_kind_of_training_it_was(flags):
    assert evaluate.label_of(dpo_args(flags)) == LABELS[flags]


def test_a_label_of_other_versions_and_of_files():
    assert evaluate.label_of({"pairs": "online"}) == "online"  # with none of the later flags
    assert evaluate.label_of({"pairs": "a/b.jsonl", "loss": "ipo"}) == "b.jsonl, ipo"
    assert evaluate.label_of({}) == "SFT"
    of_any_bytes = {name: (None, {}, []) for name in ("a\udcff.pt", "b.pt")}
    assert [label.encode() for label in evaluate.labelled(of_any_bytes)][0] == b"SFT (a?.pt)"


def load(tmp_path, **files):
    """What evaluate.py loads if these files are there: name=(model, args); the first is SFT."""
    paths = [f"{tmp_path}/{name}.pt" for name in files]
    for path, (model, args) in zip(paths, files.values()):
        save_checkpoint(path, model, args, [])
    again = [f"{tmp_path}/./{name}.pt" for name in files]
    flags = [f"--sft={paths[0]}", *paths[1:], *again]
    return evaluate.load_models(evaluate.parse_args(flags))


def test_models_that_share_a_label_show_their_paths_and_sft_is_the_file_of_its_flag(tmp_path):
    """Even if another SFT model comes first in the alphabet."""
    model, mistakes = random_model(), dpo_args("")
    files = {"sft": {}, "a_sft": {}, "b": mistakes, "c": mistakes, "d": dpo_args("--pairs offline")}
    loaded = load(tmp_path, **{name: (model, args) for name, args in files.items()})
    labels = list(evaluate.labelled(loaded))
    shared = {"sft": "SFT", "a_sft": "SFT", "b": "mistakes", "c": "mistakes"}
    expected = {f"{label} ({tmp_path}/{name}.pt)" for name, label in shared.items()}
    assert labels[0].startswith("SFT") and "/sft.pt" in labels[0]
    assert len(labels) == 5 and set(labels) == expected | {"offline"}


def test_models_of_another_reference_task_or_preference_are_left_out_by_name(tmp_path, capsys):
    """A second round of DPO has the result of the first as its reference.

    What most models prefer decides, whenever the others were trained.
    """
    sft, first = random_model(1), random_model(2)
    wide = GPT(GPTConfig(depth=1, width=8, heads=1, max_sum=30))
    four = dpo_args("--preferred-terms 4")
    of_sft, of_first = ({"reference": fingerprint(model)} for model in (sft, first))
    files = {"sft": (sft, {}), "stray": (first, dpo_args("--preferred-terms 5") | of_sft)}
    files |= {"first": (first, four | of_sft), "other": (wide, four | of_sft)}
    files |= {"second": (first, four | of_first | {"sft": "runs/first.pt"}), "wide": (wide, {})}
    files["third"] = first, four | of_sft
    included, preferred_terms = evaluate.comparable(load(tmp_path, **files))
    names = [path.rsplit("/")[-1] for path in included]
    assert names[0] == "sft.pt" and set(names) == {"sft.pt", "first.pt", "third.pt"}
    assert preferred_terms == 4
    lines = {Path(line.split(":")[0]).stem: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"stray", "second", "other", "wide"}
    assert "runs/first.pt" in lines["second"] and " 5 " in lines["stray"] and "30" in lines["wide"]
    assert all("--sft" in line for line in lines.values())
    again, _ = evaluate.comparable(load(tmp_path, **{"first": files["first"]} | files))
    assert {path.rsplit("/")[-1] for path in again} == {"first.pt", "sft.pt", "second.pt"}


def test_the_table_by_hand():
    """Two of five answers have three terms, one of these is right, and three are equations."""
    one = {"sampled": measure(FIVE, 3), "kl": 12.34}
    none = {"sampled": measure(["9=+"], 3), "kl": -1.0}
    task = {"max_sum": 20, "preferred_terms": 3}
    rows = evaluate.table({"task": task, "models": {"one": one, "none": none}}).splitlines()
    assert rows[2] == "| one | 0.400 | 0.200 | 0.400 | 0.667 | 0.600 | 12.3 |"
    assert rows[3] == "| none | 0.000 | 0.000 | 0.000 |  | 0.000 | -1.000 |"
    of_two = evaluate.table({"task": {"preferred_terms": 2}, "models": {"one": one}})
    assert "| one | 0.200 | 0.200 | 0.400 |" in of_two


def bars_of(axes):
    """{(column, whether pale): height} of all bars that can be seen."""
    bars = [(round(b.get_x() + 0.4), b.get_alpha() is not None, b) for b in axes.patches]
    return {(x, pale): bar.get_height() for x, pale, bar in bars if bar.get_height()}


def all_answers(axes):
    """The pale bars have right and wrong sums, and the bar in column 0 all other answers."""
    return sum(height for (x, pale), height in bars_of(axes).items() if pale or x == 0)


def test_bars_and_shares_by_hand():
    """Of five answers 3 are equations, of which 2 have three terms, one of them right."""
    axes, metrics = figures.Figure().subplots(), measure(FIVE, 3)
    figures.draw_histogram(axes, metrics, "", "black", 3, 5)
    pale, right = {(2, True): 20, (3, True): 40}, {(2, False): 20, (3, False): 20}
    assert bars_of(axes) == pytest.approx({(0, False): 40} | pale | right)
    assert figures.smooth([0, 1] * 20)[20] == 2 / 5 and figures.smooth([3, 1, 2]) == [3, 1, 2]
    assert list(figures.mass(metrics, 3).values()) == pytest.approx([0.2, 0.2, 0.2, 0, 0.4])
    shares = figures.mass(measure(LONG, 3), 3).values()
    assert list(shares) == pytest.approx([0, 0, 0.6, 0.2, 0.2])


def looks_and_logs():
    """A log of SFT, and one of a model with a strange name; its second look is of other answers."""
    own = [measure(answers, 3) for answers in (["9=+"], LONG, FIVE)]
    looks = [{"step": step, "own": of_step} for step, of_step in zip((0, 1, 40), own)]
    looks.insert(1, {"step": 1, "rewards/accuracies": 0.5})
    looks[-1]["rewards/accuracies"] = 0.75
    sft = [{"equations": n, "gap": gap, "exact": 0.1} for n, gap in ((900, 3.3), (1800, 3.1))]
    return {"SFT": sft, r"$\x$_^%: lr 3": looks}


def test_every_figure_is_made_whatever_the_users_settings_and_the_names_of_models(tmp_path):
    """Names with a dollar sign, or longer than a panel, and users' own settings of matplotlib."""
    logs = looks_and_logs()
    logs["mistakes (runs/a/very/long/path/" + 9 * "x" + ".pt)"] = logs[r"$\x$_^%: lr 3"]
    models = {label: {"sampled": measure(FIVE, 3)} for label in logs}
    results, of_users = {"task": {"preferred_terms": 3}, "models": models}, {"text.usetex": True}
    with pytest.MonkeyPatch.context() as patch, figures.matplotlib.rc_context(of_users):
        patch.setitem(figures.STYLE, "figure.dpi", 40)
        paths = figures.draw_all(results, logs, tmp_path)
    assert {*paths} == {str(tmp_path / name) for name in figures.FILES}
    assert {path.name for path in tmp_path.iterdir()} == {*figures.FILES}
    row = figures.draw_histograms(results).axes
    assert all(len(line) <= 26 for axes in row for line in axes.get_title().split("\n"))
    assert all(all_answers(axes) == pytest.approx(100) for axes in row)


def test_curves_show_the_numbers_of_the_log():
    """Read back from the axes: SFT, pair accuracy, and the kinds of answers in layers."""
    sft, log = looks_and_logs().values()
    gap, exact = figures.draw_sft(sft).axes
    assert gap.lines[0].get_xydata().tolist() == [[0.9, 3.3], [1.8, 3.1]]
    assert exact.lines[0].get_xydata().tolist() == [[0.9, 10], [1.8, 10]]
    low, high = gap.get_ylim()
    assert any(low < tick < high for tick in gap.get_yticks())  # a number on a short axis
    accuracy, kinds = figures.draw_mass({"x": log}, 3).axes
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 50], [40, 75]]
    below = [0, 0, 0]
    for i, layer in enumerate(kinds.collections):
        corners = {tuple(vertex) for vertex in layer.get_paths()[0].vertices.round(6).tolist()}
        for k, (step, own) in enumerate((x["step"], x["own"]) for x in log if "own" in x):
            below[k] += 100 * list(figures.mass(own, 3).values())[i]
            assert (step, round(below[k], 6)) in corners
    assert below == pytest.approx([100] * 3)


def test_the_gif_goes_from_the_first_look_to_the_last(tmp_path):
    log = looks_and_logs()[r"$\x$_^%: lr 3"]
    with figures.matplotlib.style.context({"figure.dpi": 40}):
        path = figures.save_animation({"x": log}, 3, tmp_path)
    with Image.open(path) as gif:
        frames = [gif.seek(i) or gif.convert("RGB").tobytes() for i in range(gif.n_frames)]
    assert len(set(frames)) == 3 and frames[0] != frames[1] != frames[-1] == frames[2]
