"""What evaluate.py names, measures, tabulates and draws, against hand-made answers and loops."""

import pytest
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


def load(tmp_path, **files):
    """What evaluate.py loads if these files are there: name=(model, args)."""
    paths = [f"{tmp_path}/{name}.pt" for name in files]
    for path, (model, args) in zip(paths, files.values()):
        save_checkpoint(path, model, args, [])
    flags = [f"--sft={paths[0]}", *paths[::-1], *paths]
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


def test_models_of_another_reference_or_task_are_left_out_by_name(tmp_path, capsys):
    """A second round of DPO has the result of the first as its reference."""
    sft, first = random_model(1), random_model(2)
    wide = GPT(GPTConfig(depth=1, width=8, heads=1, max_sum=30))
    of_sft, of_first = ({"reference": fingerprint(model)} for model in (sft, first))
    files = {"sft": (sft, {}), "second": (first, dpo_args("--preferred-terms 2") | of_first)}
    files |= {"first": (first, dpo_args("") | of_sft), "wide": (wide, {})}
    files["four"] = first, dpo_args("--preferred-terms 4") | of_sft
    included, terms = evaluate.comparable(load(tmp_path, **files))
    names = [path.rsplit("/")[-1] for path in included]
    left_out = capsys.readouterr().out
    assert (names[0], terms) == ("sft.pt", 4) and set(names) == {"sft.pt", "four.pt"}
    assert all(f"/{name}.pt: " in left_out for name in ("second", "first", "wide"))
    included, terms = evaluate.comparable(load(tmp_path, **{"first": files["first"]} | files))
    assert [path.rsplit("/")[-1] for path in included] == ["first.pt", "sft.pt"] and terms == 3


def test_names_of_files_break_no_table():
    label = "mistakes (runs/a|b$\udcff.pt)".encode("utf-8", "replace").decode()
    row = evaluate.markdown(["", "x"], [[label, "1"]]).splitlines()[2]
    assert row == "| mistakes (runs/a\\|b$?.pt) | 1 |"


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
    assert list(figures.mass(metrics, 3).values()) == pytest.approx([0.2, 0.2, 0.2, 0, 0.4])
    shares = figures.mass(measure(LONG, 3), 3).values()
    assert list(shares) == pytest.approx([0, 0, 0.6, 0.2, 0.2])


def test_figures_whatever_the_users_settings_and_the_names_of_files(tmp_path, monkeypatch):
    """The bars of every frame are all answers, with nine terms too, or if none is an equation."""
    monkeypatch.setitem(figures.STYLE, "figure.dpi", 40)
    frames, looks = [], [{"step": i, "own": measure(x, 3)} for i, x in enumerate((["9=+"], LONG))]
    looks[1]["rewards/accuracies"] = 0.5

    class Writer(figures.PillowWriter):
        def grab_frame(self, **options):
            frames.extend(map(all_answers, self.fig.axes))
            super().grab_frame(**options)

    monkeypatch.setattr(figures, "PillowWriter", Writer)
    labels, task = ["SFT", r"$\x$_^%: lr 3"], {"preferred_terms": 3}
    models = {x: {"sampled": look["own"]} for x, look in zip(labels, looks)}
    logs = {"SFT": [{"equations": x, "gap": 2.0, "exact": 0.1} for x in (9, 18)], labels[1]: looks}
    of_users = {"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 10}
    for folder, settings in (("a", {}), ("b", of_users)):
        (tmp_path / folder).mkdir()
        with figures.matplotlib.rc_context(settings):
            paths = figures.draw_all({"task": task, "models": models}, logs, tmp_path / folder)
    drawn = [{x.name: x.read_bytes() for x in (tmp_path / folder).iterdir()} for folder in "ab"]
    assert drawn[0] == drawn[1] and set(paths) == {f"{tmp_path}/b/{name}" for name in drawn[0]}
    assert drawn[0].keys() == {"dist.png", "dist.gif", "sft_gap.png", "mass.png"}
    figure = figures.draw_histograms({"task": task, "models": models})
    assert bars_of(figure.axes[1])[9, True] == pytest.approx(40)
    frames += map(all_answers, figure.axes)
    assert len(frames) > 8 and frames == pytest.approx([100] * len(frames))
