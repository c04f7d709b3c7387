"""What evaluate.py names, measures, tabulates and draws, against hand-made answers and loops."""

import matplotlib
import pytest
from conftest import random_model
from matplotlib.figure import Figure

import evaluate
import train_dpo
from data import CUT_OFF, measure
from model import save_checkpoint
from plots import figures

FIVE = ["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5" + CUT_OFF]
LONG = ["9=1+1+1+1+1+4", "9=1+1+1+1+1+1+1+1+1", "9=1+1+1+1+1+1+1+1+2", "9=", "9=2+7"]


def dpo_args(flags):
    return vars(train_dpo.parse_args(flags.split()))


def test_a_model_is_named_after_what_trained_it():
    """Not after its file, nor after flags such as its steps."""
    same = "--steps 7 --seed 3 --batch-size 9 --preferred-terms 4 --out x.pt"
    assert evaluate.label_of("runs/sft.pt", dpo_args(same)) == "mistakes"
    names, flags = set(), ["--pairs offline --nll-weight 0.1", "--pairs online", "--lr 0.01"]
    flags += ["--beta 0.1", "--loss ipo", "--label-smoothing 0.1", "--nll-weight 0.1"]
    for of_model in flags:
        names.add(name := evaluate.label_of("runs/dpo.pt", dpo_args(of_model)))
        assert all(value in name for value in ("dpo", *of_model.split()[1::2]))
    assert len(names) == len(flags) and not names & {"SFT", *evaluate.MODELS}


def test_the_models_of_the_readme_come_first_and_a_second_one_of_a_name_has_its_path(tmp_path):
    files = {"a": "--lr 0.01", "b": "", "c": "", "d": "--pairs offline --lr 3e-4"}
    for name, args in {"e": {}, **{x: dpo_args(flags) for x, flags in files.items()}}.items():
        save_checkpoint(tmp_path / f"{name}.pt", random_model(), args, [])
    paths = [f"{tmp_path}/{name}.pt" for name in "ecdab"]
    models, terms = evaluate.load_models(evaluate.parse_args(paths))
    *first, other, second = models
    assert first == ["SFT", "offline", "mistakes"] and paths[1] in second and terms == 3
    assert models[other][1] == dpo_args(files["a"])


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
    axes, metrics = Figure().subplots(), measure(FIVE, 3)
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
        with matplotlib.rc_context(settings):
            paths = figures.draw_all({"task": task, "models": models}, logs, tmp_path / folder)
    drawn = [{x.name: x.read_bytes() for x in (tmp_path / folder).iterdir()} for folder in "ab"]
    assert drawn[0] == drawn[1] and set(paths) == {f"{tmp_path}/b/{name}" for name in drawn[0]}
    assert drawn[0].keys() == {"dist.png", "dist.gif", "sft_gap.png", "mass.png"}
    figure = figures.draw_histograms({"task": task, "models": models})
    assert bars_of(figure.axes[1])[9, True] == pytest.approx(40)
    frames += map(all_answers, figure.axes)
    assert len(frames) > 8 and frames == pytest.approx([100] * len(frames))


def test_smooth_leaves_the_first_values_and_averages_nine_later():
    """The mean of (i - w)^2 ... (i + w)^2 is i^2 + w (w + 1) / 3."""
    squares = [i * i for i in range(50)]
    smooth = figures.smooth(squares)
    assert smooth[:8] == squares[:8]
    assert smooth[8:16] == pytest.approx([x + 2 / 3 for x in squares[8:16]])
    assert smooth[32:46] == pytest.approx([x + 20 / 3 for x in squares[32:46]])
