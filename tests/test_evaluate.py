"""What evaluate.py measures, held against enumeration, closed formulas and plain loops."""

import contextlib
import io
import itertools
import json
import math
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train_dpo
import train_sft
from data import InputError, decode, held_out_sums, random_equations, random_pairs, seen_sums
from model import GPT, GPTConfig, generate, load_checkpoint, save_checkpoint
from plots import figures

PLOTS = Path(__file__).parent.parent / "plots"
SUMS = range(5, 21)  # of the tiny models
EVALUATION_FIGURES = {"dist", "sft_gap", "dpo_curves", "mass", "tokens"}
PUBLISHED_FIGURES = {"frontier", "optimum"}


def run(script, *arguments):
    script.main(script.parse_args([str(argument) for argument in arguments]))


def drawn(folder):
    """Names of the images in a folder; what is not an image raises."""
    paths = list(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in paths)
    return {path.stem for path in paths}


def plain_logps(model, equation):
    """Log-probability of every token after the equals sign, normalised in Python floats."""
    end = "" if equation.endswith("…") else "$"
    text = " " * (4 - equation.index("=")) + equation.removesuffix("…") + end
    tokens = ["0123456789+=$ ".index(character) for character in text]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0].tolist()
    return [
        row[token] - math.log(sum(math.exp(x) for x in row))
        for row, token in zip(logits[4:], tokens[5:])
    ]


def plain_log_ratio(model, reference, equation):
    return sum(plain_logps(model, equation)) - sum(plain_logps(reference, equation))


def texts(model, sums, generator=None, greedy=False):
    tokens, _ = generate(model, [f"{n}=" for n in sums], greedy, generator)
    return [decode(row) for row in tokens.tolist()]


def save(path, model, **args):
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        save_checkpoint(file, model, args)
    return path


@pytest.fixture(scope="module", autouse=True)
def small():
    """Few equations and pixels, sums that tiny models know, and one thread: they need no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "GAP_SIZE", 30)
        patch.setattr(evaluate, "TOKEN_PAIRS", 40)
        patch.setattr(evaluate, "SHOWN_SUMS", (100, *[5] * 20))
        patch.setitem(figures.STYLE, "figure.dpi", 40)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of an SFT run and two DPO runs, all short, of tiny models."""
    folder = tmp_path_factory.mktemp("project") / "runs"
    shape = ("--depth", 2, "--width", 16, "--heads", 2, "--max-sum", 20)
    sft = folder / "sft.pt"
    run(train_sft, *shape, "--steps", 210, "--batch-size", 64, "--out", sft)
    dpo = ("--batch-size", 64, "--lr", 2e-3, "--sft", sft, "--out")
    run(train_dpo, *dpo, folder / "dpo.pt", "--steps", 12)
    run(train_dpo, *dpo, folder / "dpo_offline.pt", "--steps", 6, "--pairs", "offline")
    return folder


@pytest.fixture(scope="module")
def sft(runs):
    return load_checkpoint(runs / "sft.pt")[0]


@pytest.fixture(scope="module")
def dpo(runs):
    return load_checkpoint(runs / "dpo.pt")[0]


@pytest.fixture(scope="module")
def shares(sft):
    return evaluate.preferred_shares(sft, 3, None)


@pytest.fixture(scope="module")
def evaluation(runs):
    """What the script prints of these runs, one of whose logs is cut short in its last line."""
    log = runs / "dpo_offline.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(runs.parent)
        run(evaluate, "--samples", 4, "--seed", 5)
    return out.getvalue()


@pytest.fixture(scope="module")
def results(runs, evaluation):
    return json.loads((runs.parent / "plots" / "results.json").read_text())


# ---- metrics ---------------------------------------------------------------------------------


def test_measure_by_hand():
    """Five answers: preferred, off by 2, right with two terms, no equation, cut off."""
    metrics = evaluate.measure(["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5…"], 3)
    assert metrics == {
        "parse_rate": 0.6,
        "mae": pytest.approx(2 / 3),
        "exact": 0.4,
        "preferred": 0.2,
        "counts": {"2": 0.2, "3": 0.4},
        "exact_counts": {"2": 0.2, "3": 0.2},
        "n": 5,
    }


def test_measure_of_answers_too_small_and_of_none_that_parses():
    """An answer below its sum errs as much as one above; without an answer there is no error."""
    metrics = evaluate.measure(["9=1+2", "9=9", "9=10+2"], 2)
    assert metrics["mae"] == 3 and metrics["exact"] == pytest.approx(1 / 3)
    assert metrics["preferred"] == 0 and metrics["exact_counts"] == {"1": pytest.approx(1 / 3)}
    nothing = evaluate.measure(["9=+", "9=4+5…"], 3)
    assert nothing["mae"] is None and nothing["parse_rate"] == nothing["exact"] == 0
    assert nothing["counts"] == nothing["exact_counts"] == {}


def test_answers_come_in_order_chunk_by_chunk(dpo, monkeypatch):
    """Answers, and the chunks that hold their tokens, follow the sums that were asked."""
    asked = [*SUMS, *reversed(SUMS)]
    expected = texts(dpo, asked, greedy=True)
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    answers, chunks = evaluate.answer(dpo, asked, greedy=True)
    assert answers == expected and len(set(expected)) > 1
    assert [decode(row) for tokens, _ in chunks for row in tokens.tolist()] == expected


def test_log_ratios_equal_a_plain_loop(dpo, sft, monkeypatch):
    """Of answers in several chunks, each with its own padding."""
    monkeypatch.setattr(evaluate, "CHUNK", 30)
    generator = torch.Generator().manual_seed(3)
    answers, chunks = evaluate.answer(dpo, [*SUMS] * 5, generator=generator)
    expected = [plain_log_ratio(dpo, sft, answer) for answer in answers]
    ratios = evaluate.logps_of(dpo, chunks) - evaluate.logps_of(sft, chunks)
    assert ratios.tolist() == pytest.approx(expected, abs=1e-4)


def markov_model(seed):
    """A model whose next token depends on the last token and its column alone."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(1, 16, 2, 20)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    for layer in (model.blocks[0].attention, model.blocks[0].mlp):
        torch.nn.init.zeros_(layer.out.weight)
    return model


def test_kl_of_answers_against_the_exact_one():
    """Of two Markov chains, whose KL is a sum over columns and states."""
    model, reference = markov_model(0), markov_model(1)
    columns, equals, end = model.config.block_size, 11, 12
    rows = torch.arange(14)[:, None].expand(14, columns)  # in row v every token is v
    with torch.no_grad():
        logps, ref_logps = (m(rows).double().log_softmax(2) for m in (model, reference))
    exact, here = 0.0, torch.eye(14, dtype=torch.float64)[equals]  # unended and in each state
    for t in range(4, columns - 1):  # from the equals sign on
        exact += here @ (logps[:, t].exp() * (logps - ref_logps)[:, t]).sum(1)
        here = here @ logps[:, t].exp()
        here[end] = 0
    p = torch.full((len(SUMS),), 0.2, dtype=torch.float64)
    mean, error = evaluate.evaluate(model, reference, p, 3, 100, 0)["kl"]["total"]
    assert error < 0.1 * exact and abs(mean - exact) < 5 * error


def test_evaluate_against_answers_drawn_here(dpo, sft, shares):
    """Every part of a result, from answers that the same seed gives."""
    samples = 12
    result = evaluate.evaluate(dpo, sft, shares, 3, samples, 7)
    asked = [n for n in SUMS for _ in range(samples)]
    generator = torch.Generator().manual_seed(7)
    sampled, held_out = texts(dpo, asked, generator), held_out_sums(20)
    greedy = texts(dpo, SUMS, greedy=True)
    outside = texts(dpo, [n for n in [2, 3, 4, *range(21, 31)] for _ in range(samples)], generator)
    answers = texts(dpo, (100, *[5] * 20), generator)
    largest = texts(dpo, [20] * 10 * samples, generator)

    for decoding, equations in (("greedy", greedy), ("sampled", sampled)):
        inside = [e for e in equations if int(e.split("=")[0]) in held_out]
        others = [e for e in equations if int(e.split("=")[0]) not in held_out]
        assert result[decoding] == {
            "all": evaluate.measure(equations, 3),
            "seen": evaluate.measure(others, 3),
            "held_out": evaluate.measure(inside, 3),
        }
    assert result["outside"] == evaluate.measure(outside, 3)
    assert result["answers"] == answers

    right = [evaluate.measure(sampled[i : i + samples], 3)["exact"] for i in range(0, 192, samples)]
    assert result["exact_at_largest"] == evaluate.measure(largest, 3)["exact"] != right[0]
    assert result["lowest_exact"] == [pytest.approx(min(right)), 5 + right.index(min(right))]
    assert len(set(result["mistakes"])) == 3 and set(result["mistakes"]) <= set(sampled)
    for mistake in result["mistakes"]:
        n, terms = mistake.split("=")
        assert not all(terms.split("+")) or sum(map(int, terms.split("+"))) != int(n)

    ratios = torch.tensor([plain_log_ratio(dpo, sft, e) for e in sampled], dtype=torch.float64)
    good = torch.tensor([e.count("+") == 2 and e in right_answers() for e in sampled])
    expected = evaluate.split_kl(ratios.view(16, samples), good.view(16, samples), shares)
    for part, numbers in expected.items():
        assert result["kl"][part] == pytest.approx(numbers, abs=1e-4)
    assert evaluate.evaluate(dpo, sft, shares, 3, samples, 8)["sampled"] != result["sampled"]


def right_answers():
    """All right answers of three terms to the sums of the tiny models."""
    return {
        f"{a + b + c}={a}+{b}+{c}"
        for a, b, c in itertools.product(range(1, 19), repeat=3)
        if 5 <= a + b + c <= 20
    }


def test_a_model_has_no_kl_from_itself(sft, shares):
    """Exactly none, with no error, whatever its parts."""
    kl = evaluate.evaluate(sft, sft, shares, 3, 5, 0)["kl"]
    assert kl["total"] == [0, 0]


def test_sums_outside_of_the_range():
    """Below it and up to ten above it, but never of four digits."""
    assert evaluate.outside_sums(20) == [2, 3, 4, *range(21, 31)]
    assert evaluate.outside_sums(995) == [2, 3, 4, 996, 997, 998, 999]
    assert evaluate.outside_sums(999) == [2, 3, 4]


def test_gap_to_floor_equals_a_plain_loop(sft, monkeypatch):
    """Loss less -log of 1/4 for the number of terms and 1/C(N-1, K-1) for the terms."""
    monkeypatch.setattr(evaluate, "CHUNK", 7)
    rng, gaps = np.random.default_rng(evaluate.GAP_SEED), []
    for prompt, completion in random_equations(rng, 30, seen_sums(20)):
        ways = math.comb(int(prompt[:-1]) - 1, completion.count("+"))
        gaps.append(-sum(plain_logps(sft, prompt + completion)) - math.log(4 * ways))
    assert evaluate.gap_to_floor(sft) == pytest.approx(sum(gaps) / 30, abs=1e-4)


# ---- theory ----------------------------------------------------------------------------------


def test_preferred_shares_by_enumeration(sft, shares):
    """Sums over a + b + c = N, written out; in all 1,136 answers, more than go in one chunk."""
    assert len(right_answers()) == 1136 > evaluate.CHUNK
    assert shares.shape == (16,) and shares.dtype == torch.float64 and shares.max() > 0.1
    for n in (5, 8, 20):
        expected = sum(
            math.exp(sum(plain_logps(sft, f"{n}={a}+{b}+{n - a - b}")))
            for a in range(1, n)
            for b in range(1, n - a)
        )
        assert shares[n - 5].item() == pytest.approx(expected, rel=1e-4)
    two_terms = evaluate.preferred_shares(sft, 2, None)
    expected = sum(math.exp(sum(plain_logps(sft, f"20={a}+{20 - a}"))) for a in range(1, 20))
    assert two_terms[-1].item() == pytest.approx(expected, rel=1e-4)


def test_preferred_shares_by_sampling(sft, shares, monkeypatch):
    """Within five standard errors, or three answers where preferred ones are rare; never 0 or 1."""

    def sample(tries, seed=0):
        monkeypatch.setattr(evaluate, "TRIES", tries)
        return evaluate.preferred_shares(sft, 3, torch.Generator().manual_seed(seed))

    monkeypatch.setattr(evaluate, "ENUMERABLE", len(right_answers()))
    assert torch.equal(sample(3), shares)
    monkeypatch.setattr(evaluate, "ENUMERABLE", len(right_answers()) - 1)
    sampled, few = sample(2000), sample(20)
    assert sampled.shape == (16,) and sampled.dtype == torch.float64
    errors = (shares * (1 - shares) / 2000).sqrt()
    assert ((sampled - shares).abs() < 5 * errors + 3 / 2000).all()
    assert 0 < few.min() < few.max() < 1
    assert torch.equal(few, sample(20)) and not torch.equal(few, sample(20, seed=1))


def test_all_preferred_answers_of_the_task_can_be_enumerated():
    """161,696 of three terms for the sums 5..100, counted one by one."""
    rows = range(1, 99)
    found = sum(max(0, 100 - a - b) - max(0, 4 - a - b) for a in rows for b in rows)
    assert found == 161_696 <= evaluate.ENUMERABLE


def test_golden_numbers_of_the_optimum():
    """p = 1/4, r = 1, beta = 0.8: t = e^1.25, share t / (t + 3)."""
    p, t = torch.full((96,), 0.25, dtype=torch.float64), math.exp(1 / 0.8)
    assert t == pytest.approx(3.4903430, abs=1e-7)
    share, kl = evaluate.tilt(p, 1 / 0.8)
    assert (share, kl) == pytest.approx((0.5377748, 0.1881975), abs=1e-7)
    assert evaluate.frontier_at(p, share) == pytest.approx((0.1881975, 1.25), abs=1e-7)
    s = torch.tensor(0.5377748, dtype=torch.float64)
    assert evaluate.coin_kl(s, p[:1]).item() == pytest.approx(0.1881975, abs=1e-7)


def unequal(rng, size=16):
    """Shares p_N as different as those of a model."""
    return torch.from_numpy(rng.beta(0.5, 2, size).clip(1e-6, 0.99))


@pytest.mark.parametrize("log_t", [0.0, 0.3, 2.0, 12.0])
def test_tilt_has_a_closed_form_and_frontier_at_inverts_it(log_t):
    """s = p t / (p t + 1 - p) and KL = s log t - log(p t + 1 - p), averaged over unequal p."""
    p, t = unequal(np.random.default_rng(1)), math.exp(log_t)
    s = [x * t / (x * t + 1 - x) for x in p.tolist()]
    kl = [y * log_t - math.log(x * t + 1 - x) for x, y in zip(p.tolist(), s)]
    assert evaluate.tilt(p, log_t) == pytest.approx((sum(s) / 16, sum(kl) / 16), abs=1e-10)
    assert evaluate.coin_kl(torch.tensor(s), p).tolist() == pytest.approx(kl, abs=1e-5)
    found, found_log_t = evaluate.frontier_at(p, evaluate.tilt(p, log_t)[0])
    assert (found, found_log_t) == pytest.approx((sum(kl) / 16, log_t), abs=1e-6)


def test_both_ends_of_the_frontier():
    """What the reference has costs nothing; all answers preferred cost the mean of -log p."""
    p = unequal(np.random.default_rng(2))
    for share in (0.0, 0.5 * p.mean().item(), p.mean().item()):
        assert evaluate.frontier_at(p, share) == pytest.approx((0, 0), abs=1e-9)
    most = -p.log().mean().item()
    assert evaluate.tilt(p, 45.0) == pytest.approx((1, most), abs=1e-9)
    assert evaluate.coin_kl(torch.ones_like(p), p).mean().item() == pytest.approx(most)
    assert evaluate.coin_kl(torch.zeros_like(p), p).tolist() == pytest.approx(-(-p).log1p())
    assert evaluate.frontier_at(p, 1 - 1e-9)[0] == pytest.approx(most, abs=1e-6)


def test_no_shares_of_the_sums_cost_less_than_the_frontier():
    """Random shares with the same mean cost more, those of the optimum alone the same."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        p = unequal(rng)
        moved = p.logit() + torch.from_numpy(rng.normal(rng.uniform(0, 4), rng.uniform(0, 2), 16))
        s = moved.sigmoid()
        kl, log_t = evaluate.frontier_at(p, s.mean().item())
        cost = evaluate.coin_kl(s, p).mean().item()
        assert cost >= kl - 1e-9 and kl >= 0 and (kl > 0) == (s.mean() > p.mean()).item()
        optimum = (p.logit() + log_t).sigmoid()
        assert evaluate.coin_kl(optimum, p).mean().item() == pytest.approx(kl, abs=1e-9)


def test_best_of_n_by_hand_and_by_simulation():
    """p = 1/2, n = 2: share 3/4, KL 0.75 log 1.5 + 0.25 log 0.5. And 200,000 draws of four."""
    half = torch.tensor([0.5], dtype=torch.float64)
    assert evaluate.best_of(half, 2) == pytest.approx((0.75, 0.1308120), abs=1e-7)
    both = [evaluate.best_of(torch.tensor([p], dtype=torch.float64), 3) for p in (0.1, 0.3)]
    assert both[0][0] == pytest.approx(1 - 0.9**3)
    p = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert evaluate.best_of(p, 3) == pytest.approx(np.mean(both, axis=0))

    reference, preferred = np.array([0.1, 0.2, 0.4, 0.25, 0.05]), [0, 1]
    draws = np.random.default_rng(0).choice(5, (200_000, 4), p=reference)
    first = np.isin(draws, preferred).argmax(1)  # of the preferred ones, or of all
    best = np.bincount(draws[np.arange(len(draws)), first], minlength=5) / len(draws)
    found = best[preferred].sum(), (best * np.log(best / reference)).sum()
    p = torch.tensor([0.3], dtype=torch.float64)
    assert evaluate.best_of(p, 4) == pytest.approx(found, abs=0.01)


class Toy:
    """Four sums with six answers each, of which the first two are preferred."""

    def __init__(self):
        rng = np.random.default_rng(4)
        reference = rng.dirichlet(np.full(6, 4.0), 4)
        policy = rng.dirichlet(np.full(6, 4.0), 4)
        policy[:, :2] *= np.array([1.5, 2, 2.5, 3])[:, None]
        policy /= policy.sum(1, keepdims=True)
        self.policy, self.log_ratio = torch.from_numpy(policy), np.log(policy / reference)
        self.p = torch.from_numpy(reference[:, :2].sum(1))
        self.generator = torch.Generator().manual_seed(0)

        s, p = policy[:, :2].sum(1), reference[:, :2].sum(1)
        inside = policy[:, :2] / s[:, None], reference[:, :2] / p[:, None]
        others = policy[:, 2:] / (1 - s)[:, None], reference[:, 2:] / (1 - p)[:, None]
        drifts = [(pi * np.log(pi / ref)).sum(1) for pi, ref in (inside, others)]
        total = (policy * self.log_ratio).sum(1).mean()
        self.truth = {
            "total": total,
            "needed": (s * np.log(s / p) + (1 - s) * np.log((1 - s) / (1 - p))).mean(),
            "preferred": (s * drifts[0]).mean(),
            "others": ((1 - s) * drifts[1]).mean(),
            "excess": total - evaluate.frontier_at(self.p, s.mean())[0],
        }

    def sample(self, n):
        drawn = torch.multinomial(self.policy, n, replacement=True, generator=self.generator)
        return torch.from_numpy(self.log_ratio).gather(1, drawn), drawn < 2

    def split(self, n):
        return evaluate.split_kl(*self.sample(n), self.p)


def test_split_kl_finds_the_parts_of_known_distributions():
    """Each within five of its standard errors, which are small; the three add up to the total."""
    toy = Toy()
    assert min(toy.truth.values()) > 0.03
    parts = toy.split(20_000)
    assert list(parts) == list(toy.truth)
    for name, (mean, error) in parts.items():
        assert error < 0.01 and abs(mean - toy.truth[name]) < 5 * error
    three = (parts[name][0] for name in ("needed", "preferred", "others"))
    assert sum(three) == pytest.approx(parts["total"][0], abs=1e-12)


def test_split_kl_excess_is_above_the_frontier_at_the_mean_share():
    """And all of the KL for a policy with fewer preferred answers than the reference."""
    toy = Toy()
    ratios, good = toy.sample(200)
    parts = evaluate.split_kl(ratios, good, toy.p)
    least, _ = evaluate.frontier_at(toy.p, good.double().mean().item())
    assert parts["excess"][0] == pytest.approx(ratios.mean().item() - least, abs=1e-12)
    parts = evaluate.split_kl(ratios, good & (torch.rand(4, 200) < 0.1), toy.p)
    assert parts["excess"] == pytest.approx(parts["total"], abs=1e-9)


def test_split_kl_states_the_spread_of_many_repetitions():
    """Standard errors by the delta method, and means without the bias of few samples."""
    toy, repetitions, n = Toy(), 250, 25
    parts = [toy.split(n) for _ in range(repetitions)]
    for name, truth in toy.truth.items():
        means, errors = np.array([part[name] for part in parts]).T
        assert errors.mean() == pytest.approx(means.std(), rel=0.2)
        # the frontier at a sampled share, which is convex, is too high by about 1 / 2n a sum
        slack = 0.5 / n / 4 if name == "excess" else 0
        assert abs(means.mean() - truth) < 4 * means.std() / math.sqrt(repetitions) + slack


def test_split_kl_errors_are_those_of_the_jackknife():
    """Of each sum alone, all but one answer at a time; of several sums, roots of mean squares."""
    toy, n = Toy(), 500
    ratios, good = toy.sample(n)
    rows = [(ratios[[i]], good[[i]], toy.p[[i]]) for i in range(4)]
    for row_ratios, row_good, p in rows:
        _, first, counts = np.unique(row_ratios, return_index=True, return_counts=True)
        left = [torch.arange(n) != i for i in first]
        parts = [evaluate.split_kl(row_ratios[:, x], row_good[:, x], p) for x in left]
        for name, (_, error) in evaluate.split_kl(row_ratios, row_good, p).items():
            means = np.array([part[name][0] for part in parts])
            variance = np.average((means - np.average(means, weights=counts)) ** 2, weights=counts)
            assert error == pytest.approx(math.sqrt((n - 1) * variance), rel=0.01)
    alone = [evaluate.split_kl(*row) for row in rows]
    together = evaluate.split_kl(ratios, good, toy.p)
    for name in ("total", "needed", "preferred", "others"):
        errors = [parts[name][1] for parts in alone]
        assert together[name][1] == pytest.approx(math.hypot(*errors) / 4)
    few = evaluate.split_kl(ratios[:1, :3], good[:1, :3], toy.p[:1])
    deviation = statistics.stdev(ratios[0, :3].tolist())
    assert few["total"][1] == pytest.approx(deviation / math.sqrt(3))


@pytest.mark.parametrize("all_good", [True, False])
def test_split_kl_where_all_or_no_answers_are_preferred(all_good):
    """Only one kind of answer is left to drift; nothing is infinite."""
    toy = Toy()
    ratios, _ = toy.sample(10)
    parts = evaluate.split_kl(ratios, torch.full_like(ratios, all_good, dtype=torch.bool), toy.p)
    drift, none = ("preferred", "others") if all_good else ("others", "preferred")
    needed = -(toy.p if all_good else 1 - toy.p).log().mean().item()
    assert parts["needed"] == pytest.approx([needed, 0]) and parts[none] == [0, 0]
    assert parts[drift][0] == pytest.approx(ratios.mean().item() - needed)
    assert parts[drift][1] == pytest.approx(parts["total"][1])
    least, _ = evaluate.frontier_at(toy.p, 1 - 0.5 / 40 if all_good else 0)
    assert parts["excess"] == pytest.approx([parts["total"][0] - least, parts["total"][1]])


# ---- which token pays ------------------------------------------------------------------------


def test_token_kinds_by_hand():
    """Digits of the last term are told from those before it."""
    end, plus, last, other = range(4)
    assert evaluate.token_kinds("10+3+25") == [other, other, plus, other, plus, last, last, end]
    assert evaluate.token_kinds("7") == [last, end]
    assert evaluate.TOKEN_KINDS == ("end token", "plus signs", "last term", "other digits")


def test_who_pays_adds_up_to_plain_log_ratios(dpo, sft):
    """Over the kinds of tokens for each side, over the tokens of each string that is shown."""
    paid = evaluate.who_pays(dpo, sft, 3)
    pairs = random_pairs(np.random.default_rng(evaluate.TOKEN_SEED), 40, seen_sums(20), 3)
    for column, side in ((1, "chosen"), (2, "rejected")):
        totals = dict.fromkeys(evaluate.TOKEN_KINDS, 0.0)
        for pair in pairs:
            equation, plus = pair[0] + pair[column], pair[column].rindex("+")
            for i, (logp, ref_logp) in enumerate(
                zip(plain_logps(dpo, equation), plain_logps(sft, equation))
            ):
                character = (pair[column] + "$")[i]
                kind = "last term" if i > plus else "other digits"
                kind = {"$": "end token", "+": "plus signs"}.get(character, kind)
                totals[kind] += (logp - ref_logp) / len(pairs)
        assert paid[side] == pytest.approx(totals, abs=1e-4)
        whole = sum(plain_log_ratio(dpo, sft, pair[0] + pair[column]) for pair in pairs)
        assert sum(paid[side].values()) == pytest.approx(whole / len(pairs), abs=1e-4)

    shown = [pair for pair in pairs if len(pair[0]) == 3][:3]
    expected = [("chosen", p, c) for p, c, _ in shown] + [("rejected", p, r) for p, _, r in shown]
    assert [(s["side"], s["prompt"], s["text"]) for s in paid["strings"]] == expected
    for string in paid["strings"]:
        equation = string["prompt"] + string["text"]
        assert len(string["nats"]) == len(string["text"]) + 1
        assert sum(string["nats"]) == pytest.approx(plain_log_ratio(dpo, sft, equation), abs=1e-4)


# ---- answers to look at ----------------------------------------------------------------------


def test_marks_by_hand():
    """Right and preferred, right with another count, wrong by how much, no equation."""
    assert evaluate.mark("9=3+3+3", 3) == "✓ 9=3+3+3"
    assert evaluate.mark("9=4+5", 3) == "✓ 9=4+5 (2 terms)"
    assert evaluate.mark("9=3+4+4", 3) == "✗ 9=3+4+4 (off by +2)"
    assert evaluate.mark("9=1+1", 3) == "✗ 9=1+1 (off by -7)"
    assert evaluate.mark("9=4+5…", 3) == "✗ 9=4+5… (no equation)"


def test_ask_prints_aligned_answers_and_warns_outside_of_the_range(sft, dpo, capsys):
    """A greedy and three sampled answers a line; a line above for sums nobody has learned."""
    models = {"sft": sft, "a_much_longer_name": dpo}
    evaluate.ask(models, [20, 21, 4, 5], 3, 1)
    lines = capsys.readouterr().out.splitlines()
    warnings = [lines.pop(5), lines.pop(2)]
    assert [line.split(" ", 1)[0] for line in warnings] == ["4", "21"]
    assert all("outside of 5..20" in line for line in warnings)
    assert len({(line.index(" greedy "), line.index(" sampled ")) for line in lines}) == 1
    asked = [(n, name) for n in (20, 21, 4, 5) for name in models]
    for line, (n, name) in zip(lines, asked, strict=True):
        answers = texts(models[name], [n], greedy=True)
        answers += texts(models[name], [n] * 3, torch.Generator().manual_seed(1))
        greedy, sampled = line.split(" sampled ")
        assert greedy.split() == [name, "greedy", *evaluate.mark(answers[0], 3).split()]
        assert sampled.split() == " ".join(evaluate.mark(a, 3) for a in answers[1:]).split()


# ---- figures ---------------------------------------------------------------------------------


def test_every_figure_of_a_run_is_drawn(runs, evaluation):
    """By the script itself, which makes the folder."""
    assert drawn(runs.parent / "plots") == EVALUATION_FIGURES


def test_figures_without_material_are_left_out(results, tmp_path):
    """Of an SFT model alone, without its log, there are only the answers."""
    alone = results | {"models": {"sft": results["models"]["sft"]}}
    figures.draw_all(alone, {"sft": []}, tmp_path)
    assert drawn(tmp_path) == {"dist"}


def published():
    """A small published.json, with every colour and marker."""
    p = torch.tensor([0.2, 0.3], dtype=torch.float64)
    names = ["offline", "offline + NLL", "offline, smoothed", "offline, IPO", "online"]
    names += ["reference", "on-policy", "imitation"]
    return {
        "frontier": {
            "curve": [evaluate.tilt(p, log_t) for log_t in range(8)],
            "best of n": [[n, *evaluate.best_of(p, n)] for n in (2, 4)],
        },
        "methods": {name: {"points": [[1.5, 0.9], [0.0, 1.0]]} for name in names},
        "judge": [
            {"source": source, "beta": beta, "kind": kind} | JUDGED
            for source in ("on-policy", "reference")
            for beta, kind in ((0.3, ""), (2.0, ""), (0.3, "imitation of the winners"))
        ],
    }


JUDGED = {"share predicted": [0.7, 0, 0.7, 0.7], "preferred": [0.6, 0.1, 0.5, 0.7]}


def test_figures_of_many_runs_are_drawn(tmp_path):
    """From published.json alone."""
    figures.draw_published(published(), tmp_path)
    assert drawn(tmp_path) == PUBLISHED_FIGURES


@pytest.mark.skipif(not (PLOTS / "published.json").exists(), reason="nothing is published yet")
def test_the_published_files_can_be_drawn(tmp_path):
    """results.json, logs.json and published.json as they come with the project."""
    for name in ("results.json", "logs.json", "published.json"):
        shutil.copy(PLOTS / name, tmp_path)
    run(evaluate, "--replot", "--plots-dir", tmp_path)
    assert drawn(tmp_path) == EVALUATION_FIGURES | PUBLISHED_FIGURES


def test_histogram_shows_shares_of_all_answers():
    """Bars of all answers, of right ones, and of those that are none, in percent."""
    metrics = evaluate.measure(["9=3+3+3", "9=3+4+4", "9=4+5", "9=+", "9=4+5…"], 3)
    _, axes = figures.plt.subplots()
    figures.draw_histogram(axes, metrics, "some model", "black", 3, 5)
    figures.plt.close()
    bars = {(round(b.get_x() + b.get_width() / 2), b.get_alpha()): b for b in axes.patches}
    heights = {place: bar.get_height() for place, bar in bars.items() if bar.get_height()}
    expected = {(0, None): 40, (2, 0.35): 20, (3, 0.35): 40, (2, None): 20, (3, None): 20}
    assert heights == pytest.approx(expected)
    assert axes.get_title() == "some model\nexact 0.400, mean abs. error 0.67"


def test_kinds_of_answers_over_the_steps_share_all_of_them():
    """Of ten answers 2 are preferred, 3 have three terms, 5 are right and 8 are equations."""
    own = {"own/preferred": 0.2, "own/form": 0.3, "own/exact": 0.5, "own/parsed": 0.8}
    shares = [share(own) for share, _ in figures.MASS.values()]
    assert shares == pytest.approx([0.2, 0.1, 0.3, 0.2, 0.2])
    assert figures.smooth([0, 0, 6, 0, 0], window=3) == [0, 2, 2, 2, 0]
    assert figures.in_order(["b", "dpo", "a", "sft"]) == ["sft", "dpo", "a", "b"]


# ---- the script ------------------------------------------------------------------------------


def test_results_hold_what_was_measured(results, runs, sft, dpo, shares):
    """The shares of this reference, and each model's own material."""
    models = results["models"]
    assert results["task"] == {"max_sum": 20, "preferred_terms": 3}
    assert results["p"] == shares.tolist()
    assert list(models) == ["sft", "dpo_offline", "dpo"]
    expected = evaluate.evaluate(dpo, sft, shares, 3, 4, 5)
    assert {key: models["dpo"][key] for key in expected} == json.loads(json.dumps(expected))
    assert models["dpo"]["tokens"] == evaluate.who_pays(dpo, sft, 3)
    assert models["sft"]["gap"] == evaluate.gap_to_floor(sft)
    assert "gap" not in models["dpo"] and "tokens" not in models["sft"]
    assert models["dpo"]["args"]["lr"] == 2e-3
    last = json.loads((runs / "dpo.jsonl").read_text().splitlines()[-1])
    assert models["dpo"]["seconds"] == last["seconds"] > 0


def test_a_log_cut_short_is_used_up_to_there(runs, results, evaluation):
    """With a word about it; the other logs are whole, and so are the results."""
    logs = json.loads((runs.parent / "plots" / "logs.json").read_text())
    assert [len(log) for log in logs.values()] == [30, 6, 13]
    assert [record["step"] for record in logs["dpo_offline"]] == [0, 1, 2, 3, 4, 5]
    assert results["models"]["dpo_offline"]["seconds"] == logs["dpo_offline"][-1]["seconds"]
    complaints = [line for line in evaluation.splitlines() if "cut short" in line]
    assert len(complaints) == 1 and "dpo_offline.jsonl is cut short in line 7" in complaints[0]


def test_the_script_prints_marked_answers_and_a_table(evaluation, results):
    """Of each model some answers and its mistakes, then all of them side by side."""
    for name, result in results["models"].items():
        block = evaluation.split(f"{name}: some answers")[1].split("\n\n")[0]
        shown = [evaluate.mark(e, 3) for e in result["answers"] + result["mistakes"]]
        assert [line.strip() for line in block.splitlines()[1:]] == shown
        assert any(line.startswith("✓") for line in shown)
    exact = [f"{r['sampled']['all']['exact']:.3f}" for r in results["models"].values()]
    assert "|  | SFT | offline DPO | online DPO |" in evaluation
    assert f"| exact | {' | '.join(exact)} |" in evaluation


def test_replot_draws_the_same_figures_from_json_alone(runs, evaluation, tmp_path):
    """Byte for byte; and those of many runs, where there is a published.json."""
    for name in ("results.json", "logs.json"):
        shutil.copy(runs.parent / "plots" / name, tmp_path)
    (tmp_path / "published.json").write_text(json.dumps(published()))
    run(evaluate, "--replot", "--plots-dir", tmp_path)
    assert drawn(tmp_path) == EVALUATION_FIGURES | PUBLISHED_FIGURES
    for name in EVALUATION_FIGURES:
        before = runs.parent / "plots" / f"{name}.png"
        assert (tmp_path / before.name).read_bytes() == before.read_bytes()


@pytest.mark.parametrize(
    "results, logs, complaint",
    [
        (None, "{}", "cannot read .*results.json"),
        ("{}", "{} and more", "cannot read .*logs.json"),
        ("\x00", "{}", "cannot read .*results.json"),
        ("{}", "{}", "JSON files in .* are not"),
        ("[]", "{}", "JSON files in .* are not"),
        ("null", "{}", "JSON files in .* are not"),
        ('{"models": {}, "task": {"preferred_terms": 3}}', "{}", "JSON files in .* are not"),
        (
            '{"models": {"sft": 1}, "task": {"preferred_terms": 3}}',
            "{}",
            "JSON files in .* are not",
        ),
        ('{"models": {}}', "[]", "JSON files in .* are not"),
        ('{"models": {}}', '{"dpo": [1]}', "JSON files in .* are not"),
    ],
)
def test_replot_of_foreign_json_is_one_clear_line(results, logs, complaint, tmp_path):
    """Whatever is wrong with the files."""
    for name, content in (("results", results), ("logs", logs)):
        if content is not None:
            (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        run(evaluate, "--replot", "--plots-dir", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_models_of_another_reference_are_refused(runs, sft, tmp_path):
    """By the fingerprint in a checkpoint of DPO; by the range of sums in any."""
    other = save(tmp_path / "other.pt", markov_model(2))
    wide = save(tmp_path / "wide.pt", GPT(GPTConfig(1, 16, 2, 30)))
    plots = ("--plots-dir", tmp_path / "plots")
    with pytest.raises(InputError, match=f"dpo was not trained from {other}"):
        run(evaluate, runs / "sft.pt", runs / "dpo.pt", "--sft", other, *plots)
    with pytest.raises(InputError, match=f"sft was not trained from {wide}"):
        run(evaluate, runs / "sft.pt", "--sft", wide, *plots)
    for stranger in (wide, save(tmp_path / "four.pt", sft, preferred_terms=4)):
        with pytest.raises(InputError, match="differ in --max-sum or --preferred-terms"):
            run(evaluate, runs / "dpo.pt", stranger, "--sft", runs / "sft.pt", *plots)
    assert not (tmp_path / "plots").exists()


def test_the_preferred_terms_are_those_of_the_checkpoints(runs, sft, tmp_path):
    """Three where no model has been trained to prefer any."""
    four = save(tmp_path / "four.pt", sft, preferred_terms=4)
    for paths, terms in (([runs / "sft.pt"], 3), ([runs / "sft.pt", four], 4)):
        args = evaluate.parse_args([str(path) for path in paths])
        assert evaluate.load_models(args, "cpu")[-1] == terms


def test_checkpoints_need_names_and_have_to_be_there(runs, tmp_path, monkeypatch):
    """Two of one name, none at all."""
    copy = shutil.copy(runs / "sft.pt", tmp_path)
    with pytest.raises(InputError, match="the same file name"):
        run(evaluate, runs / "sft.pt", copy, "--sft", copy)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no checkpoint in runs/"):
        run(evaluate)


def test_a_folder_that_cannot_be_written_is_found_out_before_measuring(runs, tmp_path, capsys):
    """And so is a results.json that is a folder."""
    (tmp_path / "file").touch()
    (tmp_path / "results.json").mkdir()
    for folder in (tmp_path / "file" / "plots", tmp_path):
        with pytest.raises(InputError, match="cannot write"):
            run(evaluate, runs / "sft.pt", "--sft", runs / "sft.pt", "--plots-dir", folder)
    assert capsys.readouterr().out == ""


def test_results_are_written_last_and_whole(runs, evaluation, tmp_path, capsys):
    """Where a figure cannot be written the old ones stay, and nothing is left behind."""
    changed = {path.name: path.stat().st_ctime_ns for path in (runs.parent / "plots").iterdir()}
    assert max(changed.values()) == changed["results.json"]
    for name in ("results.json", "logs.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "dist.png").mkdir()
    files = {path.name for path in tmp_path.iterdir()}
    sft = runs / "sft.pt"
    with pytest.raises(InputError, match="cannot write .*dist.png"):
        run(evaluate, sft, "--sft", sft, "--samples", 2, "--plots-dir", tmp_path)
    assert "some answers" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (tmp_path / "results.json").read_text() == (tmp_path / "logs.json").read_text() == "old"


def test_ask_neither_measures_nor_writes(runs, tmp_path, monkeypatch, capsys):
    """All models in the order of the README, one line a sum, and sums of three digits at most."""
    monkeypatch.chdir(runs.parent)
    run(evaluate, "--ask", 9, "--plots-dir", tmp_path / "plots")
    lines = [line for line in capsys.readouterr().out.splitlines() if "cut short" not in line]
    assert [line.split()[0] for line in lines] == ["sft", "dpo_offline", "dpo"]
    assert not (tmp_path / "plots").exists()
    with pytest.raises(SystemExit):
        run(evaluate, "--ask", 9, 1000)
    assert "up to 999" in capsys.readouterr().err


def test_a_foreign_published_json_is_refused_before_anything_is_measured(
    runs, tmp_path, monkeypatch
):
    path = tmp_path / "published.json"
    monkeypatch.setattr(evaluate.tables, "PUBLISHED", path)
    for text in ("[", "{}", '{"models": 3}', '{"models": {"sft": {}}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="is not of this project; make publish writes it"):
            run(evaluate, runs / "sft.pt", "--sft", runs / "sft.pt", "--plots-dir", tmp_path / "p")
        assert not (tmp_path / "p").exists()
