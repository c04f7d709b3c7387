"""What is measured, drawn and tabulated, against enumeration, closed forms and plain loops."""

import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import evaluate
import train_dpo
import train_sft
from data import CUT_OFF, collate, held_out_sums, is_exact, is_preferred, measure
from data import random_equations, random_pairs, seen_sums
from model import GPT, GPTConfig, completion_logps, generate, load_checkpoint
from plots import figures, lesson, optimum, tables, yardstick

SUMS = range(5, 21)  # of the tiny models
FIVE = ["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5" + CUT_OFF]


def run(script, *arguments):
    script.main(script.parse_args([str(argument) for argument in arguments]))


def plain_rows(model, equation):
    """Each token after the equals sign with the log-probs of all tokens there, in Python floats."""
    text = equation.removesuffix(CUT_OFF) + ("" if equation.endswith(CUT_OFF) else "$")
    tokens, start = ["0123456789+=$".index(character) for character in text], text.index("=")
    with torch.no_grad():
        rows = model(torch.tensor([tokens]))[0].tolist()[start:-1]
    logs = [math.log(sum(map(math.exp, row))) for row in rows]
    rows = [[x - log for x in row] for row, log in zip(rows, logs)]
    return list(zip(tokens[start + 1 :], rows))


def plain_logp(model, equation):
    return sum(row[token] for token, row in plain_rows(model, equation))


def draw(model, sums, seed):
    return evaluate.answer(model, sums, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder: tiny models, one log of which is cut short, and their evaluation."""
    folder = tmp_path_factory.mktemp("project")
    shape = ("--depth", 1, "--width", 16, "--heads", 2, "--max-sum", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_sft, "LOOKS", 6)
        patch.setattr(train_dpo, "EVEN_LOOKS", 1)
        patch.setitem(figures.STYLE, "figure.dpi", 40)
        run(train_sft, *shape, "--steps", 120, "--batch-size", 64, "--lr", 0.03)
        run(train_dpo, "--batch-size", 32, "--steps", 9)
        run(train_dpo, "--batch-size", 32, "--steps", 4, "--out", "runs/try.pt")
        log = Path("runs/try.jsonl")
        log.write_bytes(log.read_bytes()[:-20])
        run(evaluate, "--samples", 4, "--seed", 5)
        yield folder


@pytest.fixture
def results(folder):
    return json.loads((folder / "plots/results.json").read_text())


@pytest.fixture(scope="module")
def sft(folder):
    return load_checkpoint(folder / "runs/sft.pt")[0]


@pytest.fixture(scope="module")
def dpo(folder):
    return load_checkpoint(folder / "runs/dpo.pt")[0]


# ---- one model -------------------------------------------------------------------------------


def test_answers_and_logps_keep_their_order_over_several_chunks(dpo, monkeypatch):
    equations = [*FIVE, "20=1+2+17", "5=", "10=" + CUT_OFF, "7=2", *FIVE[::-1]]
    expected = [plain_logp(dpo, equation) for equation in equations]
    prompts = [f"{n}=" for n in [*SUMS, *reversed(SUMS)]]
    greedy = ["".join(pair) for pair in zip(prompts, generate(dpo, prompts, greedy=True))]
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    assert evaluate.logps_of(dpo, equations).tolist() == pytest.approx(expected, abs=1e-4)
    assert evaluate.answer(dpo, [*SUMS, *reversed(SUMS)], greedy=True) == greedy
    assert draw(dpo, SUMS, 1) == draw(dpo, SUMS, 1) != draw(dpo, SUMS, 2)


def test_metrics_are_those_of_answers_drawn_here(dpo, sft, results):
    """The script draws the answers with its seed, and then measures just these."""
    sampled = draw(dpo, np.repeat(SUMS, 4), 5)
    ratios = evaluate.logps_of(dpo, sampled) - evaluate.logps_of(sft, sampled)
    result = evaluate.evaluate(dpo, sampled, ratios, 3, 5)
    held_out = [e for e in sampled if int(e.split("=")[0]) in held_out_sums(20)]
    greedy = generate(dpo, [f"{n}=" for n in SUMS], greedy=True)
    assert len(held_out) == 40 and 0 < result["sampled"]["exact"] < 1
    assert result["sampled"] == measure(sampled, 3) and result["held out"] == measure(held_out, 3)
    assert result["greedy"] == measure([f"{n}={a}" for n, a in zip(SUMS, greedy)], 3)
    expected = [plain_logp(dpo, e) - plain_logp(sft, e) for e in sampled]
    assert result["kl"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert np.std(expected) > 0.01
    assert result["answers"] == draw(dpo, [20, 11, 9], 5)
    assert len(result["mistakes"]) == 3 and not any(map(is_exact, result["mistakes"]))
    assert set(result["mistakes"]) <= set(sampled)
    assert {key: results["models"]["dpo"][key] for key in result} == result
    assert results["task"] == {"max_sum": 20, "preferred_terms": 3}


def random_model(seed, max_sum=20):
    """A model whose block does nothing: the last token and its position decide on the next."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(1, 16, 2, max_sum)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_kl_of_answers_is_within_five_standard_errors_of_the_exact_one():
    """Of two Markov chains."""
    model, reference = random_model(0), random_model(1)
    longest = model.config.block_size - 4  # tokens of an answer that does not end
    rows = torch.arange(13)[:, None].expand(13, longest)  # every token of a row is the same
    with torch.no_grad():
        logps, ref_logps = (m(rows).double().log_softmax(2) for m in (model, reference))
    exact, here = 0.0, torch.eye(13, dtype=torch.float64)[11]  # at the equals sign
    for t in range(longest):
        exact += (here @ (logps[:, t].exp() * (logps - ref_logps)[:, t]).sum(1)).item()
        here = here @ logps[:, t].exp()
        here[12] = 0  # has ended
    answers = draw(model, np.repeat(SUMS, 200), 0)
    ratios = evaluate.logps_of(model, answers) - evaluate.logps_of(reference, answers)
    error = 5 * ratios.std().item() / math.sqrt(len(answers))
    assert ratios.mean().item() == pytest.approx(exact, abs=error) and error < 0.2 * exact


# ---- the yardstick ---------------------------------------------------------------------------


def test_preferred_shares_by_enumeration(sft, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 100)
    shares, of_two = yardstick.preferred_shares(sft, 3), yardstick.preferred_shares(sft, 2)
    assert shares.shape == (16,) and shares.dtype == torch.float64 and 0.02 < shares.max() < 1
    for n in (5, 8, 20):
        twos = [f"{n}={a}+{n - a}" for a in range(1, n)]
        threes = [f"{n}={a}+{b}+{n - a - b}" for a in range(1, n) for b in range(1, n - a)]
        for found, equations in ((of_two, twos), (shares, threes)):
            expected = sum(math.exp(plain_logp(sft, equation)) for equation in equations)
            assert found[n - 5].item() == pytest.approx(expected, rel=1e-4)


def test_the_chosen_logratio_has_a_ceiling(dpo, sft):
    """E[log pi/pi_ref] = log(s/p) - KL(ref_E || pi_E) <= -log p over preferred answers of ref."""
    p, s = yardstick.preferred_shares(sft, 3), yardstick.preferred_shares(dpo, 3)
    for n in (6, 9, 12):
        equations = [f"{n}={a}+{b}+{n - a - b}" for a in range(1, n) for b in range(1, n - a)]
        ref, pi = (evaluate.logps_of(model, equations).double() for model in (sft, dpo))
        ref_e, pi_e = ref - p[n - 5].log(), pi - s[n - 5].log()  # given E
        mean = (ref_e.exp() * (pi - ref)).sum().item()
        kl = (ref_e.exp() * (ref_e - pi_e)).sum()
        assert mean == pytest.approx(((s / p)[n - 5].log() - kl).item(), abs=1e-6)
        assert kl > 1e-4 and mean < -p[n - 5].log().item()


def test_all_preferred_answers_up_to_100_are_enumerated(monkeypatch):
    """A fresh model gives each of 13 tokens the same probability, so lengths tell the shares."""
    model, rows = GPT(GPTConfig(1, 4, 1)).eval(), []
    monkeypatch.setattr(evaluate, "CHUNK", 20_000)
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    shares, expected = yardstick.preferred_shares(model, 3), [0.0] * 101
    assert sum(rows) == 161_696
    for n in range(5, 101):
        for a, b in itertools.combinations(range(1, n), 2):
            expected[n] += 13.0 ** -len(f"{a}+{b - a}+{n - b}$")
    assert shares.tolist() == pytest.approx(expected[5:], rel=1e-4)


def unequal(seed):
    """Shares that differ between sums as much as those of a model."""
    return torch.from_numpy(np.random.default_rng(seed).beta(0.5, 2, 16).clip(1e-6, 0.99))


@pytest.mark.parametrize("log_t", [0.0, 0.3, 2.0, 12.0])
def test_the_optimum_has_a_closed_form_which_the_frontier_inverts(log_t):
    """s = p t / (p t + 1 - p) and KL = s log t - log(p t + 1 - p), averaged over the sums."""
    p, t = unequal(1), math.exp(log_t)
    s = [x * t / (x * t + 1 - x) for x in p.tolist()]
    kl = [y * log_t - math.log(x * t + 1 - x) for x, y in zip(p.tolist(), s)]
    point = sum(s) / 16, sum(kl) / 16
    assert yardstick.optimal_policy(p, log_t) == pytest.approx(point, abs=1e-10)
    assert yardstick.bernoulli_kl(torch.tensor(s), p).tolist() == pytest.approx(kl, abs=1e-5)
    assert yardstick.frontier_kl(p, point[0]) == pytest.approx(point[1], abs=1e-6)


def test_golden_numbers_and_both_ends_of_the_frontier():
    """With p = 1/4, r = 1 and beta = 0.8, t is e^1.25 and the share t / (t + 3)."""
    assert math.exp(1 / 0.8) == pytest.approx(t := 3.4903430, abs=1e-7)
    quarters = torch.full((96,), 0.25).double()
    golden = yardstick.optimal_policy(quarters, 1 / 0.8)
    assert golden == pytest.approx((0.5377748, 0.1881975), abs=1e-7)
    assert yardstick.frontier_kl(quarters, t / (t + 3)) == pytest.approx(0.1881975, abs=1e-7)
    p = unequal(2)
    most, mean = -p.log().mean().item(), p.mean().item()
    assert [yardstick.frontier_kl(p, x) for x in (0, mean / 2, mean)] == pytest.approx([0] * 3)
    assert yardstick.optimal_policy(p, 45.0) == pytest.approx((1, most), abs=1e-9)
    assert yardstick.frontier_kl(p, 1 - 1e-9) == pytest.approx(most, abs=1e-6)


def test_best_of_n_by_hand_and_by_simulation():
    """p = 1/2, n = 2: share 3/4, KL 0.75 log 1.5 + 0.25 log 0.5. And 100,000 draws of four."""
    half, p = (torch.tensor([x], dtype=torch.float64) for x in (0.5, 0.3))
    assert yardstick.best_of(half, 2) == pytest.approx((0.75, 0.1308120), abs=1e-7)
    reference = np.array([0.1, 0.2, 0.4, 0.25, 0.05])  # the first two answers are preferred
    draws = np.random.default_rng(0).choice(5, (100_000, 4), p=reference)
    drawn = np.bincount(draws[np.arange(100_000), (draws < 2).argmax(1)]) / 100_000
    expected = drawn[:2].sum(), (drawn * np.log(drawn / reference)).sum()
    assert yardstick.best_of(p, 4) == pytest.approx(expected, abs=0.01)


def test_the_parts_of_the_kl_are_unbiased_and_add_up():
    """Of 10,000 repetitions of 20 samples, within 0.003 nats; the bias would be over 0.01.

    Four sums have six answers each, of which the first two are preferred.
    """
    rng = np.random.default_rng(4)
    ref, pi = torch.from_numpy(rng.dirichlet(np.full(6, 4.0), (2, 4)))
    pi[:, :2] *= torch.tensor([1.5, 2, 2.5, 3])[:, None]
    pi /= pi.sum(1, keepdim=True)
    s, p, ratios = pi[:, :2].sum(1), ref[:, :2].sum(1), (pi / ref).log()
    needed = s * (s / p).log() + (1 - s) * ((1 - s) / (1 - p)).log()
    preferred = (pi * (ratios - (s / p).log()[:, None]))[:, :2].sum(1)
    others = (pi * (ratios - ((1 - s) / (1 - p)).log()[:, None]))[:, 2:].sum(1)
    total = (pi * ratios).sum(1)
    truth = {"total": total, "needed": needed, "preferred": preferred, "others": others}
    truth |= {"excess": total - yardstick.frontier_kl(p, s.mean().item())}
    truth = {name: x.mean().item() for name, x in truth.items()}
    generator = torch.Generator().manual_seed(0)
    assert min(truth.values()) > 0.03
    for repeats, tolerance in ((10_000, 0.003), (1, 1)):
        drawn = torch.multinomial(pi.repeat(repeats, 1), 20, True, generator=generator)
        sampled = ratios.repeat(repeats, 1).gather(1, drawn)
        parts = yardstick.split_kl(sampled, drawn < 2, p.repeat(repeats))
        assert parts == pytest.approx(truth, abs=tolerance)
        three = parts["needed"] + parts["preferred"] + parts["others"]
        assert three == pytest.approx(parts["total"], abs=1e-12)
    least = yardstick.frontier_kl(p, (drawn < 2).double().mean().item())
    assert parts["excess"] == pytest.approx(sampled.mean().item() - least, abs=1e-12)
    for good, none, share in ((True, "others", p), (False, "preferred", 1 - p)):
        parts = yardstick.split_kl(sampled, torch.full((4, 20), good), p)
        assert parts[none] == 0 and parts["needed"] == pytest.approx(-share.log().mean().item())
        least = parts["total"] - parts["excess"]
        assert least > 0.5 if good else least == pytest.approx(0, abs=1e-12)


# ---- figures, the lesson and its tables ------------------------------------------------------


def test_bars_and_shares_by_hand():
    """Of five answers 3 are equations, of which 2 have three terms, one of them right."""
    metrics = measure(FIVE, 3)
    axes = Figure().subplots()
    figures.draw_histogram(axes, metrics, "", "black", 3, 5)
    bars = {(round(b.get_x() + 0.4), b.get_alpha()): b.get_height() for b in axes.patches}
    expected = {(0, None): 40, (2, 0.35): 20, (3, 0.35): 40, (2, None): 20, (3, None): 20}
    assert {k: height for k, height in bars.items() if height} == pytest.approx(expected)
    assert list(figures.mass(metrics, 3).values()) == pytest.approx([0.2, 0.2, 0.2, 0, 0.4])
    assert figures.smooth([0, 0, 6, 0, 0], window=3) == [0, 2, 2, 2, 0]
    assert figures.in_order(["b", "dpo", "a", "sft"]) == ["sft", "dpo", "a", "b"]


def images(folder):
    paths = [*folder.glob("*.png"), *folder.glob("*.gif")]
    return {path.name: hash(path.read_bytes()) for path in paths}


def test_figures_of_any_models_whatever_the_users_settings(folder, results, tmp_path):
    """The log that is cut short is left out, and so is one of another number of steps."""
    steps = {"sft": 120, "dpo": 9, "try": 4}
    logs = {name: evaluate.read_log(str(folder / f"runs/{name}.pt"), steps[name]) for name in steps}
    assert [len(log) for log in logs.values()] == [6, 15, 0]
    assert len(evaluate.read_log(str(folder / "runs/dpo.pt"), 10)) == 0
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.dpi": 10}):
        figures.draw_all(results, logs, tmp_path)
    assert images(tmp_path) == images(folder / "plots")
    assert images(tmp_path).keys() == {"dist.png", "dist.gif", "sft_gap.png", "mass.png"}
    (alone := tmp_path / "alone").mkdir()
    results = results | {"models": {"try": {"sampled": measure(["9=+", "5="], 3)}}}
    figures.draw_all(results, {"try": logs["dpo"][:3]}, alone)
    assert images(alone).keys() == {"dist.png", "dist.gif", "mass.png"}


def test_loss_of_all_pairs_with_a_noisy_judge_by_hand(monkeypatch):
    """The preferred of two answers wins with probability sigmoid(1), either of two equals 1/2."""
    monkeypatch.setattr(optimum, "ANSWERS", 3)
    torch.manual_seed(0)
    logps, ref_logps = torch.randn(2, 2, 3)
    preferred = torch.tensor([[True, False, False], [True, True, False]])
    losses, imitation = [], []
    for pi, ref, good in zip(logps.tolist(), ref_logps.tolist(), preferred.tolist()):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            p = 1 / (1 + math.exp(good[j] - good[i]))
            z = (pi[i] - ref[i]) - (pi[j] - ref[j])
            for chance, margin, winner in ((p, z, pi[i]), (1 - p, -z, pi[j])):
                losses.append(chance * math.log(1 + math.exp(-0.4 * margin)))
                imitation.append(-chance * winner)
    for loss, expected in (("sigmoid", losses), ("imitation", imitation)):
        settings = {"loss": loss, "beta": 0.4}
        mean = optimum.loss_of_all_pairs(logps, ref_logps, preferred, settings)
        assert mean.item() == pytest.approx(sum(expected) / 6, abs=1e-6)


@pytest.mark.parametrize("pairs", ["online", "reference"])
def test_training_with_a_noisy_judge_is_that_of_a_plain_loop(pairs, folder, monkeypatch):
    monkeypatch.setattr(optimum, "PROMPTS", 3)
    settings = {"pairs": pairs, "loss": "sigmoid", "beta": 0.5, "steps": 30, "lr": 1e-3}
    model, policy, reference, average = (load_checkpoint(folder / "runs/sft.pt")[0] for _ in "1234")
    trained = optimum.train(policy, reference, settings, 7)
    optimizers, rng = train_sft.make_optimizers(model, 0), np.random.default_rng(7)
    torch.manual_seed(7)
    for step in range(30):
        prompts = [f"{n}=" for n in rng.choice(seen_sums(20), 3) for _ in range(16)]
        examples = list(zip(prompts, generate(model if pairs == "online" else reference, prompts)))
        logps, ref_logps = (completion_logps(m, *collate(examples)) for m in (model, reference))
        z = (logps - ref_logps.detach()).view(3, 16)
        good = torch.tensor([float(is_preferred(x + y, 3)) for x, y in examples]).view(3, 16)
        z, good = z[:, :, None] - z[:, None], good[:, :, None] - good[:, None]
        losses = -good.sigmoid() * F.logsigmoid(
            0.5 * z
        )  # both orders of every pair, and 16 of z = 0
        (losses.sum() / (3 * 16 * 15 / 2)).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min((step + 1) / 1.5, 1, (1 - step / 30) / 0.7)
            optimizer.step()
            optimizer.zero_grad()
        cubes = [(n + 1) * (n + 2) * (n + 3) for n in range(step + 1)]
        for kept, new in zip(average.parameters(), model.parameters()):
            kept.data += (new.data - kept.data) * cubes[-1] / sum(cubes)
    for ours, kept, last in zip(trained.parameters(), average.parameters(), model.parameters()):
        assert (ours - kept).norm() < 0.02 * (last - kept).norm()


@pytest.fixture(scope="module")
def judged(folder, sft):
    """The study with a noisy judge, of a few steps, for the same model with each seed."""
    small = {"BETAS": (0.3, 2), "RATES": (3e-3, 3), "SEEDS": (1, 2), "STEPS": 8}
    small |= {"PROMPTS": 6, "SAMPLES": 20}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(optimum, name, value)
        for module in (lesson, optimum):
            patch.setattr(module, "RUNS", folder / "noisy")
        (folder / "noisy").mkdir()
        for seed in (0, 1, 2):
            (folder / f"noisy/sft_{seed}.pt").write_bytes((folder / "runs/sft.pt").read_bytes())
            p = {"p": yardstick.preferred_shares(sft, 3).tolist()}
            (folder / f"noisy/sft_{seed}.json").write_text(json.dumps(p))
        with ThreadPoolExecutor(1) as pool:
            content = optimum.optimum(pool)
            assert json.dumps(optimum.optimum(pool)) == json.dumps(content)  # from its files
    return content


def test_the_study_of_a_noisy_judge(judged, sft):
    """Each run stands beside the optimum of its beta, and DPO has moved towards it."""
    p = yardstick.preferred_shares(sft, 3)
    winners = [n * (n + 2 * (1 - n) / (1 + math.exp(-1))) for n in p.tolist()]
    kl = [
        s * math.log(s / n) + (1 - s) * math.log((1 - s) / (1 - n))
        for s, n in zip(winners, p.tolist())
    ]
    assert [len(judged[key]) for key in ("checks", "study")] == [5, 5]
    for entry in judged["study"]:
        loss, beta, rate = (entry["settings"][key] for key in ("loss", "beta", "lr"))
        predicted = yardstick.optimal_policy(p, 1 / beta)
        if loss == "imitation":
            predicted = np.mean(winners), np.mean(kl)
        assert [run["seed"] for run in entry["runs"]] == [1, 2] and rate == 3e-3
        for run in entry["runs"]:
            assert tuple(run["predicted"].values()) == pytest.approx(predicted)
            assert 0 <= run["preferred"] <= run["exact"] <= 1 and run["kl"] != 0
            assert loss == "imitation" or run["z"]["reference"] > 0


def test_the_lesson_against_plain_loops_and_what_is_made_of_it(
    dpo, sft, judged, tmp_path, monkeypatch
):
    for name, value in {"EQUATIONS": 20, "PAIRS": 20}.items():
        monkeypatch.setattr(lesson, name, value)
    examples = random_equations(np.random.default_rng(lesson.EQUATION_SEED), 20, seen_sums())
    ways = [4 * math.comb(int(x[:-1]) - 1, y.count("+")) for x, y in examples]
    nats = [-plain_logp(dpo, x + y) - math.log(n) for (x, y), n in zip(examples, ways)]
    assert lesson.gap_to_floor(dpo) == pytest.approx(np.mean(nats), abs=1e-4)
    p = yardstick.preferred_shares(sft, 3)
    study = lesson.study(dpo, sft, p, 5, 8)
    kinds, sides = [], []
    for x, chosen, y in random_pairs(np.random.default_rng(lesson.PAIR_SEED), 20, seen_sums(20), 3):
        ratios = [plain_logp(dpo, x + side) - plain_logp(sft, x + side) for side in (chosen, y)]
        sides.append([*ratios, -math.log(p[int(x[:-1]) - 5])])
        (last, before), (_, after) = plain_rows(dpo, x + y)[-2:]
        before, after = np.exp(before), np.exp(after)
        digits, right = before[:10].sum(), before[last]
        kinds.append([after[12], after[10], after[:10].sum(), right, digits - right])
    expected = dict(zip(tables.NEXT_TOKEN, np.mean(kinds, axis=0)))
    assert study["next token"] == pytest.approx(expected, abs=1e-5)
    expected = dict(zip(("chosen", "rejected", "ceiling"), np.mean(sides, axis=0)))
    assert study["offline pairs"] == pytest.approx(expected, abs=1e-4)
    generator, asked = torch.Generator().manual_seed(5), (SUMS, [20] * 10, lesson.OUTSIDE)
    drawn = [evaluate.answer(dpo, np.repeat(sums, 8), generator=generator) for sums in asked]
    exact = [[is_exact(equation) for equation in answers] for answers in drawn]
    per_sum = [sum(exact[0][i : i + 8]) / 8 for i in range(0, 128, 8)]
    assert study["worst sum"] == [5 + per_sum.index(min(per_sum)), min(per_sum)]
    assert [study["largest"], study["outside"]] == [np.mean(x) for x in exact[1:]]
    good = torch.tensor([is_preferred(equation, 3) for equation in drawn[0]]).view(16, 8)
    ratios = evaluate.logps_of(dpo, drawn[0]) - evaluate.logps_of(sft, drawn[0])
    assert study["kl parts"] == yardstick.split_kl(ratios.view(16, 8), good, p)
    looks = [{"step": step, "kl": step, "preferred": 0.1 * step, "exact": 1.0} for step in range(3)]
    result = study | {"gap": 1.0, "seconds": None, "looks": looks}
    method = {"settings": {"pairs": "offline", "lr": 1e-3}, "runs": [result, result]}
    content = {"sft": [result], "methods": dict.fromkeys(lesson.METHODS, method)}
    content |= {"frontier": lesson.frontier([{"p": p.tolist()}]), "optimum": judged}
    runs = tables.published_runs(content)
    page = "kept\n" + "".join(f"<!-- table {x} -->\nSTALE\n<!-- end -->\n" for x in tables.TABLES)
    page = tables.fill(page, content)
    models = f"<!-- table models -->\n{tables.models_table(runs)}\n<!-- end -->\n"
    assert page.startswith("kept\n<!-- table ") and models in page and "STALE" not in page
    assert tables.fill(page, content) == page
    figures.draw_published(content, runs, judged, tmp_path)
    drawn = ("frontier", "rewards", "next_token", "optimum")
    assert images(tmp_path).keys() == {f"{name}.png" for name in drawn}


def test_cells_and_rows_by_hand():
    values = [0.98765], [12.0, 13.0], [-1e-5], [1.0, None]
    assert list(map(tables.cell, values)) == ["0.988", "12.5 ± 0.7", "0.000", ""]
    one = {"sampled": measure(FIVE, 3), "kl": 0.5, "seconds": None}
    table = tables.models_table({"try": [one], "sft": [one, one | {"kl": 1.5}]}).splitlines()
    assert table[0].startswith("|  | 3 terms | preferred | exact | mean abs. error | parse rate |")
    assert table[3] == "| try | 0.400 | 0.200 | 0.400 | 0.667 | 0.600 | 0.500 |  |"
    assert "1.000 ± 0.707" in table[2] and tables.exact_three_terms(one) == 0.5
    assert tables.exact_three_terms({"sampled": measure(["9=4+5"], 3)}) is None


def test_intervals_of_differences_by_hand():
    """Of 0.1, 0.2, ... 0.5: 0.3 +- 2.776 x 0.1581 / sqrt(5)."""

    def runs(values):
        of_answers = [{"preferred": x, "exact": x} for x in values]
        return [{"sampled": x, "kl parts": {"excess": x["exact"]}} for x in of_answers]

    methods = {name: {"runs": runs([0.5] * 5)} for name in lesson.METHODS}
    methods["imitation"] = {"runs": runs([0.6, 0.7, 0.8, 0.9, 1])}
    rows = tables.differences_table({"methods": methods}).splitlines()
    start = "| imitation vs. mistakes + NLL | above the frontier | +0.300 | +0.104 to +0.496 |"
    assert rows[2] == f"{start} yes |" and rows[5].endswith("| +0.000 to +0.000 | none seen |")
