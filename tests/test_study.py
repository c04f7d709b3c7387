"""The study: its frontier, parts, tables and figures, against closed forms and plain loops."""

import copy
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from conftest import ALPHABET, mixed_model, plain_logits, plain_logp

import train_dpo
from data import CUT_OFF, InputError, collate, entropy_floor, is_exact, is_preferred, parse
from data import random_equations, random_pairs, read_pairs, seen_sums
from model import GPT, GPTConfig, answer, completion_logps, generate, load_checkpoint
from model import logratios_of, save_checkpoint
from plots.figures import STYLE
from plots.study import collapse, frontier, interventions, judge, methods
from plots.study import rlhf, runs, tables
from train_sft import make_optimizers

SEEN = seen_sums(20)  # of the tiny models
SEEDS = (1, 2, 3)
SHORT = {"steps": 1, "batch-size": 4}
SMALL = {  # the whole study in seconds: module: its constants
    runs: {"SAMPLES": 5, "SEEDS": SEEDS},
    train_dpo: {"EVEN_LOOKS": 1},
    methods: {
        "RATES": (3e-4, 1e-3),
        "FIRST_RATES": (3e-4, 1e-3),
        "PAIRS": 20,
        "EQUATIONS": 20,
        "SEEDS": SEEDS,
    },
    rlhf: {"STEPS": 2, "BATCH": 8, "LOOKS": (1,), "SEEDS": SEEDS},
    interventions: {"STEPS": 3, "BATCH": 8, "PAIRS": 20, "SEEDS": SEEDS},
    collapse: {
        "CASES": {
            "five terms": {"preferred-terms": 5} | SHORT,
            "a file": {"pairs in a file": 30} | SHORT,
        }
    },
    judge: {"STEPS": 4, "PROMPTS": 3, "ANSWERS": 4},
}


@pytest.fixture(scope="module", autouse=True)
def sft(tmp_path_factory):
    """In the working folder there is a model per seed, near this one, as the study would train."""
    model = mixed_model(SEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        for module, constants in SMALL.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        patch.setitem(STYLE, "figure.dpi", 30)
        runs.RUNS.mkdir(parents=True)
        for seed in (0, *SEEDS):
            save_checkpoint(runs.RUNS / f"sft_{seed}.pt", changed(model, seed), {}, [])
        yield model


def changed(model, seed):
    """A copy with other weights."""
    model, state = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=state)
    return model


# ---- the frontier ----------------------------------------------------------------------------


def test_preferred_shares_of_a_fresh_model_follow_from_lengths():
    """It gives each of 13 tokens the same probability. Of all sums up to 40, C(40, 3) - 4 ways."""
    model, rows = GPT(GPTConfig(1, 4, 1, max_sum=40)).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    shares = frontier.preferred_shares(model, 3)
    assert sum(rows) == math.comb(40, 3) - 4
    for n, share in zip(range(5, 41), shares.tolist()):
        ways = [f"{a}+{b}+{n - a - b}$" for a in range(1, n) for b in range(1, n - a)]
        assert share == pytest.approx(sum(13.0 ** -len(way) for way in ways), rel=1e-4)


def test_the_frontier_has_a_closed_form_and_golden_numbers():
    """s = p t / (p t + 1 - p) and KL = s log t - log(p t / s), averaged over the sums.

    Golden are p = 1/4 with t = e^(1 / 0.8) = 3.490343, so s = t / (t + 3), and the best of two with
    p = 1/2: share 3/4, KL 0.75 log 1.5 + 0.25 log 0.5.
    """
    p = torch.linspace(0.001, 0.9, 16).double() ** 2
    for log_t in (0.0, 0.3, 2.0, 12.0):
        s = [x * math.exp(log_t) / (x * math.exp(log_t) + 1 - x) for x in p.tolist()]
        kl = [y * log_t - math.log(x * math.exp(log_t) / y) for x, y in zip(p.tolist(), s)]
        assert frontier.optimal_policy(p, log_t) == pytest.approx((fmean(s), fmean(kl)), abs=1e-9)
        assert frontier.bernoulli_kl(torch.tensor(s).double(), p).tolist() == pytest.approx(kl)
        assert frontier.frontier_kl(p, fmean(s)) == pytest.approx(fmean(kl), abs=1e-6)
    quarters, halves = torch.full((96,), 0.25).double(), torch.full((2,), 0.5).double()
    golden = pytest.approx((0.5377748, 0.1881975), abs=1e-7)
    assert frontier.optimal_policy(quarters, 1 / 0.8) == golden
    assert frontier.best_of_n(halves, 2) == pytest.approx((0.75, 0.1308120), abs=1e-7)
    assert frontier.best_of_n(quarters, 3)[0] == pytest.approx(1 - 0.75**3)


@pytest.mark.parametrize("kl_weight", [0.1, 0.2, 0.8])
def test_the_optimum_with_a_kl_is_that_of_a_search_over_shares(kl_weight):
    """For one p, z = log-odds(s) - log-odds(p). With a small weight all answers are preferred."""
    p = 0.3
    s = torch.linspace(p, 1 - 1e-9, 100_000).double()
    z = s.logit() - math.log(p / (1 - p))
    kl = frontier.bernoulli_kl(s, torch.tensor(p).double())
    best = (F.softplus(-0.8 * z) + kl_weight * kl).argmin()
    share, its_kl = frontier.optimum_with_kl(torch.tensor([p]).double(), kl_weight, 0.8)
    assert (share, its_kl) == pytest.approx((s[best].item(), kl[best].item()), abs=2e-3)
    assert (share > 0.999) == (kl_weight == 0.1)


def test_the_parts_of_the_kl_are_unbiased():
    """Of 10,000 repetitions of 20 samples, within 0.003 nats; the bias would be over 0.01.

    Four sums have six answers each, of which the first two are preferred.
    """
    torch.manual_seed(5)
    ref, pi = torch.distributions.Dirichlet(torch.full((6,), 4.0).double()).sample((2, 4))
    pi[:, :2] *= torch.tensor([1.5, 2, 2.5, 3])[:, None]
    pi /= pi.sum(1, keepdim=True)
    s, p, ratios = pi[:, :2].sum(1), ref[:, :2].sum(1), (pi / ref).log()
    truth = {"total": (pi * ratios).sum(1)}
    truth["needed"] = s * (s / p).log() + (1 - s) * ((1 - s) / (1 - p)).log()
    truth["preferred"] = (pi * (ratios - (s / p).log()[:, None]))[:, :2].sum(1)
    truth["others"] = (pi * (ratios - ((1 - s) / (1 - p)).log()[:, None]))[:, 2:].sum(1)
    truth["excess"] = truth["total"] - frontier.frontier_kl(p, s.mean().item())
    truth = {name: x.mean().item() for name, x in truth.items()}
    drawn = torch.multinomial(pi.repeat(10_000, 1), 20, True)
    sampled = ratios.repeat(10_000, 1).gather(1, drawn)
    parts = frontier.split_kl(sampled, drawn < 2, p.repeat(10_000))
    assert parts == pytest.approx(truth, abs=0.003) and min(truth.values()) > 0.03
    for good, none, share in ((True, "others", p), (False, "preferred", 1 - p)):
        parts = frontier.split_kl(sampled[:4], torch.full((4, 20), good), p)
        assert parts[none] == 0 and parts["needed"] == pytest.approx(-share.log().mean().item())


# ---- kept results and workers ----------------------------------------------------------------


def counted(calls, value):
    """A run that notes that it was computed."""
    calls.append(value)
    return {"x": [value, None]}


def test_a_result_is_computed_once_and_never_half_written():
    calls = []
    for _ in range(2):
        assert runs.kept(counted, calls, 1.5) == {"x": [1.5, None]}
        calls.clear()  # its name is part of the name of the result
    folder = runs.path_of(counted, []).parent
    assert [path.name for path in folder.iterdir()] == ["[]_1.5.json"]
    with pytest.raises(ValueError):
        runs.kept(counted, [], math.nan)
    assert len(list(folder.iterdir())) == 1


def test_the_hash_of_code_is_that_of_a_file_and_what_it_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "plots" / "study")
    part, imported, other = (tmp_path / f"{name}.py" for name in ("part", "imported", "other"))
    part.write_text("from imported import x")
    hashes = []
    for file in (imported, other, part, imported):
        with file.open("a") as code:
            code.write("\nx = 1\n")
        hashes.append(runs.hash_of_code.__wrapped__(str(part)))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_a_failing_run_is_named_at_once():
    with ThreadPoolExecutor(2) as pool:
        start = time.time()
        with pytest.raises(RuntimeError, match="1_0"):
            runs.gather(pool, "", sleep_or_divide, {"slow": [(0.6, 1)], "bad": [(1, 0)]})
        assert time.time() - start < 0.5


def sleep_or_divide(seconds, divisor):
    if divisor:
        time.sleep(seconds)
    return seconds / divisor


INTERRUPTED = """
import time
from pathlib import Path
from data import run_script
from plots.study import runs

def work(pool):
    futures = pool.submit(Path("started").touch), pool.submit(time.sleep, 20)
    return [future.result() for future in futures]

run_script(lambda: runs.write_part("part", work))
"""


def started_study(folder):
    """A study that has begun to work, as a process in a group of its own."""
    env = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=folder,
        env=os.environ | env,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_an_interrupted_study_leaves_no_worker(tmp_path):
    """By Ctrl-C, which all processes hear, or SIGTERM. A worker would hold the pipe of errors."""
    by_user, by_signal = (started_study(tmp_path / name) for name in "ab")
    while len(list(tmp_path.glob("*/started"))) < 2:
        assert by_user.poll() is None and by_signal.poll() is None
        time.sleep(0.02)
    os.killpg(by_user.pid, signal.SIGINT)
    by_signal.terminate()
    for process in (by_user, by_signal):
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 130 and b"Traceback" not in errors
    assert sorted(tmp_path.rglob("*")) == [
        tmp_path / x for x in ("a", "a/started", "b", "b/started")
    ]


# ---- what is measured and chosen -------------------------------------------------------------


def test_all_that_is_asked_of_a_model_is_that_of_plain_loops(sft):
    p, policy, seed = frontier.preferred_shares(sft, 3), changed(sft, 7), 2
    result = methods.asked_of(policy, sft, p, seed)

    chosen, rejected, ceiling = [], [], []
    for x, *sides in random_pairs(random.Random(methods.PAIR_SEED), 20, SEEN, 3):
        for side, ratios in zip(sides, (chosen, rejected)):
            ratios.append(plain_logp(policy, x + side) - plain_logp(sft, x + side))
        ceiling.append(-math.log(p[int(x[:-1]) - 5]))
    expected = {"chosen": chosen, "rejected": rejected, "ceiling": ceiling}
    expected = {side: fmean(values) for side, values in expected.items()}
    assert result["offline pairs"] == pytest.approx(expected, abs=1e-4)

    fives = [n for n in range(5, 21) for _ in range(5)]
    drawn = answer(policy, fives, generator=torch.manual_seed(seed))
    good = torch.tensor([is_preferred(equation, 3) for equation in drawn])
    ratios = logratios_of(policy, sft, drawn).double()
    assert result["kl parts"] == frontier.split_kl(ratios.view(16, 5), good.view(16, 5), p)
    largest = answer(policy, [20] * 1000, generator=torch.manual_seed(seed))
    assert result["largest"] == fmean(map(is_exact, largest))


def shares(preferred, exact=0.9):
    return {"sampled": {"preferred": preferred, "exact": exact, "n": 1000}}


def test_most_preferred_answers_win_unless_others_within_the_noise_are_more_exact():
    """Two standard errors of a difference are 0.028 for shares of 0.89, and 0.015 for 0.95 and 1.

    At a share of 1 there is noise in the other share still.
    """
    a, b, c = shares(0.9, 0.9), shares(0.88, 0.95), shares(0.86, 1.0)
    for tried in itertools.permutations([("a", a), ("b", b), ("c", c)]):
        assert methods.most_preferred(tried) == "b"
    assert methods.most_preferred([("a", shares(0.9, 0.95)), ("b", shares(0.9, 0.96))]) == "a"
    assert methods.most_preferred([("a", shares(1.0, 0.9)), ("b", shares(0.999, 0.99))]) == "b"


def test_the_rates_beside_the_best_one_are_tried_too(monkeypatch):
    """Most are preferred at the best rate, and fewer the farther it is; b = 2 adds some."""
    monkeypatch.setattr(methods, "RATES", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
    best = {"low": 3e-5, "middle": 3e-4, "high": 3e-3, "beyond": 1}

    def run(settings, seed):
        distance = abs(math.log(settings["lr"] / best[settings["m"]]))
        return shares(0.7 - 0.1 * distance + 0.1 * settings["b"]) | {"run": [settings, seed]}

    variants = {name: [{"m": name, "b": b} for b in (1, 2)] for name in best}
    with ThreadPoolExecutor(1) as pool:
        entries = methods.at_best_settings(pool, run, variants, (4, 2))
    first = [(b, lr) for b in (1, 2) for lr in methods.FIRST_RATES]
    more = {"low": [1e-4, 3e-5, 1e-5], "middle": [1e-4], "high": [3e-3, 1e-2]}
    more["beyond"] = more["high"]
    for name in best:
        tried, settings = entries[name]["tried"], entries[name]["settings"]
        rates = [(settings["b"], settings["lr"]) for settings, _, _ in tried]
        assert rates == first + [(2, lr) for lr in more[name]]
        assert tried[0][1:] == [run(tried[0][0], 0)["sampled"]["preferred"], 0.9]
        assert settings == {"m": name, "b": 2, "lr": min(best[name], 1e-2)}
        assert [x["run"] for x in entries[name]["runs"]] == [[settings, 4], [settings, 2]]


# ---- RLHF ------------------------------------------------------------------------------------


def plain_reward(model, equation):
    """Of one row that nothing fills up."""
    prompt, _, completion = equation.partition("=")
    text = f"{prompt:0>3}={completion}$".replace(CUT_OFF + "$", "")
    return plain_logits(model, [ALPHABET.index(c) for c in text])[-1, 0].item()


@pytest.fixture(scope="module")
def reward_model(sft):
    """It has learned for some steps, at a high rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "STEPS", 40)
        patch.setattr(rlhf, "REWARD_LR", 1e-2)
        model = rlhf.new_reward_model(1)
        rlhf.train_reward_model(model, 3)
    return model


def test_rewards_are_those_of_the_last_tokens_and_learned_from_the_pairs(sft, reward_model):
    equations = ["9=3+3", "20=10+9+1", "9=4+5…", "5=", "20=1+1+1+1+16", "7=…"]
    examples = [(f"{n}=", side) for n, side in (equation.split("=") for equation in equations)]
    expected = [plain_reward(reward_model, equation) for equation in equations]
    assert rlhf.rewards_of(reward_model, examples).tolist() == pytest.approx(expected, abs=1e-5)
    about = rlhf.about_rewards(reward_model, sft, 4)
    for kind, examples in rlhf.kinds_of_answers(4, SEEN).items():
        right, three = "exact" in kind, "3 terms" in kind
        assert all(is_exact(x + y) == right and (y.count("+") == 2) == three for x, y in examples)
        assert about[kind] == pytest.approx(
            rlhf.rewards_of(reward_model, examples).mean().item(), abs=1e-5
        )
    assert about["3 terms, exact"] > about["other count, exact"] + 0.5


def test_the_optimum_of_the_learned_reward_weighs_answers_by_hand(sft, reward_model):
    """Five answers to a sum are weighed by exp(r / beta); the KL is the mean of log(5 weight)."""
    found = {"preferred": 0, "exact": 0, "kl": 0}
    fives = [n for n in SEEN for _ in range(5)]
    answers = answer(sft, fives, generator=torch.manual_seed(4))
    for i in range(0, len(answers), 5):
        factors = [math.exp(plain_reward(reward_model, x) / 0.8) for x in answers[i : i + 5]]
        for factor, equation in zip(factors, answers[i : i + 5]):
            weight = factor / sum(factors)
            found["preferred"] += weight * is_preferred(equation, 3) / len(SEEN)
            found["exact"] += weight * is_exact(equation) / len(SEEN)
            found["kl"] += weight * math.log(5 * weight) / len(SEEN)
    optimum = rlhf.about_rewards(reward_model, sft, 4)["optimum"]
    assert optimum == pytest.approx(found, abs=1e-5)


# ---- interventions ---------------------------------------------------------------------------


def test_the_tokens_of_rejected_sides_that_count():
    tokens, mask = collate([("43=", side) for side in ("4+5", "10+30+13", "20", "1+22")])
    expected = {
        interventions.all_tokens: ["4+5$", "10+30+13$", "20$", "1+22$"],
        interventions.end_token: ["$", "$", "$", "$"],
        interventions.first_terms: ["4+", "10+30+", "", "1+"],
        interventions.last_term: ["5", "13", "20", "22"],
    }
    for tokens_that_count, texts in expected.items():
        rows = zip(tokens.tolist(), tokens_that_count(tokens, mask).tolist())
        kept = ["".join(ALPHABET[t] for t, counts in zip(*row) if counts) for row in rows]
        assert kept == texts


def test_half_of_the_rejected_sides_have_a_wrong_sum():
    rng = random.Random(0)
    pairs = random_pairs(rng, 1000, SEEN, 3)
    sides = [interventions.half_wrong_sums(rng, pair) for pair in pairs]
    wrong = [parse(x + side) for (x, _, other), side in zip(pairs, sides) if side != other]
    assert all(abs(sum(terms) - n) in (1, 2, 3, 10) for n, terms in wrong)
    assert len(wrong) / 1000 == pytest.approx(0.5, abs=0.08)
    assert fmean(len(terms) == 3 for _, terms in wrong) == pytest.approx(0.5, abs=0.08)


def test_the_variant_offline_ends_in_the_weights_of_the_script():
    """In double precision. z at the end is that of other pairs."""
    flags = {"pairs": "offline", "lr": 3e-3, "steps": 3, "batch-size": 8, "seed": 2}
    flags["sft"] = runs.RUNS / "sft_2.pt"
    torch.set_default_dtype(torch.float64)
    try:
        by_script = load_checkpoint(runs.trained(train_dpo, "script", flags))[0]
        policy, reference = (load_checkpoint(flags["sft"])[0] for _ in range(2))
    finally:
        torch.set_default_dtype(torch.float32)
    z, expected = interventions.train(policy, reference, "offline", 3e-3, 2), []
    for ours, theirs, start in zip(*(x.parameters() for x in (policy, by_script, reference))):
        assert (ours - theirs).abs().max() < 1e-9 < (theirs - start).abs().max()
    for x, *pair in random_pairs(random.Random(interventions.PAIR_SEED), 20, SEEN, 3):
        a, b = (plain_logp(policy, x + y) - plain_logp(reference, x + y) for y in pair)
        expected.append(a - b)
    assert z == pytest.approx(fmean(expected))


def test_collapse_trains_on_the_pairs_of_its_file():
    settings = {"pairs": "offline", "pairs in a file": 7} | SHORT
    collapse.run(settings, 1)
    _, args, _ = load_checkpoint(runs.RUNS / f"{runs.name_of((settings, 1))}.pt")
    assert read_pairs(args["pairs"], 100) == random_pairs(random.Random(1), 7, seen_sums(), 3)


# ---- the noisy judge -------------------------------------------------------------------------


def loss_by_hand(kind, policy, reference, prompts):
    """Of three prompts with four answers each, at beta = 0.5.

    The preferred of two answers wins with probability sigmoid(1), either of two equals with 1/2.
    """
    completions = generate(reference if kind == "reference DPO" else policy, prompts)
    batch = collate(list(zip(prompts, completions)))
    logps = completion_logps(policy, *batch)
    ratios = logps - completion_logps(reference, *batch).detach()
    good = [float(is_preferred(x + y, 3)) for x, y in zip(prompts, completions)]
    costs, loss = [0.5 * ratio.item() - x for ratio, x in zip(ratios, good)], 0
    for i, j in itertools.permutations(range(12), 2):
        if kind == "RL":
            loss += (costs[i] - costs[j]) / 11 * logps[i] / 12
        elif i // 4 == j // 4:
            wins = 1 / (1 + math.exp(good[j] - good[i]))
            loss -= wins * F.logsigmoid(0.5 * (ratios[i] - ratios[j])) / 18
    return loss


@pytest.mark.parametrize("kind", judge.KINDS)
def test_training_with_a_noisy_judge_is_that_of_a_plain_loop(kind, sft):
    trained, plain, reference = (copy.deepcopy(sft).double() for _ in range(3))
    judge.train(trained, reference, {"kind": kind, "beta": 0.5, "lr": 3e-3}, 7)
    torch.manual_seed(7)
    rng, optimizers = random.Random(7), make_optimizers(plain, 3e-3)
    for step in range(1, 5):
        prompts = [f"{n}=" for n in rng.choices(SEEN, k=3) for _ in range(4)]
        runs.update(optimizers, loss_by_hand(kind, plain, reference, prompts), step, 4)
    for ours, theirs, start in zip(*(x.parameters() for x in (trained, plain, sft))):
        assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_the_curve_of_the_optimum_and_the_nearest_rate():
    """p = 1/4, beta = 0.8: the golden share of the frontier, between two points of the curve."""
    curve = judge.curve([[0.25] * 96] * 2)
    (share,) = [share for beta, share in curve if beta == pytest.approx(0.8)]
    assert share == pytest.approx(0.5377748, abs=1e-5)
    optimum = {"optimum": {"preferred": 0.5}}
    tried = [(lr, shares(share) | optimum) for lr, share in ((1, 0.3), (2, 0.6), (3, 0.9))]
    assert judge.nearest(tried) == 2


# ---- the whole study -------------------------------------------------------------------------


class Pool(ThreadPoolExecutor):
    """In which a run does not start before the SFT model of its seed is there."""

    def submit(self, kept, run, *task):
        assert run is runs.sft or runs.path_of(runs.sft, task[-1:]).exists()
        return super().submit(kept, run, *task)


@pytest.fixture(scope="module")
def study(sft):
    """All parts, twice: the second time from the files of the first. One method stands for all."""
    content = {}
    of_methods = sum((methods.METHODS | methods.MORE_METHODS).values(), [])
    settings = [s | {"lr": lr} for s in of_methods for lr in methods.RATES]
    settings += [methods.OFFLINE | {"kl-weight": x, "lr": 3e-4} for x in methods.KL_WEIGHTS]
    for seed in (0, *SEEDS):
        runs.kept(runs.sft, seed)
        result = methods.run({"pairs": "mistakes", "lr": 3e-3} | SHORT, seed)
        for of_method in settings:
            path = runs.path_of(methods.run, (of_method, seed))
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result))

    def files():
        return {path: path.stat().st_mtime_ns for path in runs.RUNS.rglob("*.*")}

    with Pool(1) as pool:
        for module in (methods, rlhf, interventions, collapse, judge):
            for path in runs.path_of(runs.sft, (0,)).parent.iterdir():
                path.unlink()
            part = getattr(module, module.__name__.split(".")[-1])
            content[part.__name__], before = part(pool), files()
            assert json.dumps(part(pool)) == json.dumps(content[part.__name__])
            assert files() == before
    return json.loads(json.dumps(content))


def seeds_of(results):
    return [result["seed"] for result in results]


def test_part_1_has_all_runs_and_the_gap_of_sft(study):
    sft = study["methods"]["sft"]
    for method in study["methods"]["methods"].values():
        flags = [f"--{flag}={value}" for flag, value in method["settings"].items()]
        assert train_dpo.parse_args(flags) and seeds_of(method["runs"]) == list(SEEDS)
        assert method["runs"][1]["kl"] != 0 == sft[1]["kl"] == method["runs"][1]["looks"][0]["kl"]
    assert [seeds_of(x) for x in study["methods"]["kl weights"].values()] == [[1, 2, 3]] * 5
    equations = random_equations(random.Random(methods.EQUATION_SEED), 20, seen_sums())
    equations = ["".join(example) for example in equations]
    gap = -fmean(plain_logp(runs.start(2)[0], x) for x in equations) - entropy_floor(equations)
    assert sft[1]["gap"] == pytest.approx(gap, abs=1e-4)


def test_the_other_parts_have_all_runs(study):
    assert len(study["rlhf"]["rewards"]) == 3
    assert {"offline", *study["interventions"]} == interventions.VARIANTS.keys()
    for of_part in (study["rlhf"]["methods"], study["interventions"], study["collapse"]):
        entries = of_part.values()
        assert len({entry["runs"][0]["kl"] for entry in entries}) == len(entries) > 1
        assert {tuple(seeds_of(entry["runs"])) for entry in entries} == {(1, 2, 3)}
        assert {len(entry["tried"]) for entry in entries} == {2}
    zs = [entry["runs"][0]["z of pairs"] for entry in study["interventions"].values()]
    assert len(set(zs)) == len(zs)
    for run in study["collapse"]["five terms"]["runs"]:
        assert run["sampled"]["preferred"] == run["sampled"]["exact_counts"].get("5", 0)
    for entry in study["judge"]["study"].values():
        beta, results = entry["settings"]["beta"], entry["runs"]
        assert seeds_of(results) == [1, 2, 3] and len(entry["tried"]) == 2
        for result in results:
            p = runs.start(result["seed"])[2]
            share, kl = frontier.optimal_policy(p, 1 / beta)
            assert result["optimum"] == pytest.approx({"preferred": share, "kl": kl})
            sampled = result["sampled"]
            assert 0 <= sampled["preferred"] <= sampled["exact"] <= 1 and result["kl"] != 0


# ---- the pages -------------------------------------------------------------------------------


def test_all_tables_and_figures_are_made_or_none(study, tmp_path, monkeypatch):
    one, other = tmp_path / "a.md", tmp_path / "b.md"
    text = "kept\n" + "".join(f"<!-- table {x} -->\nOLD\n<!-- end -->\n" for x in tables.TABLES)
    monkeypatch.setattr(tables, "PAGES", (one, other))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="make methods"):
        tables.main()
    for name, content in study.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    one.write_text(text)
    other.write_text("<!-- table unknown -->\n<!-- end -->")
    with pytest.raises(KeyError):
        tables.main()
    assert one.read_text() == text and not list(tmp_path.glob("*.png"))
    other.write_text("no table")
    tables.main()
    page = one.read_text()
    assert page.startswith("kept\n<!-- table ") and "OLD" not in page and "nan" not in page
    assert tables.fill(page, tables.read_study()) == page
    assert {x.stem for x in tmp_path.glob("*.png")} == {"frontier", "rewards", "rlhf", "judge"}


def test_cells_by_hand():
    values = [0.98765], [12.0, 13.0], [-1e-5], [1.0, None], [None]
    assert list(map(tables.cell, values)) == ["0.988", "12.5 ± 0.7", "0.000", "1.000", ""]
    assert tables.cell([12.0, None, 13.0], spread=False) == "12.5"
    assert tables.cells_of([{"x": None}], {"x": lambda r: r["x"]}, ["x"]) == [""]


def test_paired_differences_by_hand():
    """Differences of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), times 4.30265."""
    ones, others = [5, 7, 9], [4, 5, 6]
    assert tables.paired(float, ones, others) == "+2.000 [-0.484, +4.484]"
    five = tables.paired(float, [1, 2, 3, 4, 5], [0] * 5)  # 2.77645 sqrt(2.5 / 5) = 1.963
    assert five == "+3.000 [+1.037, +4.963]"
