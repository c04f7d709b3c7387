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
from conftest import ALPHABET, mixed_model, plain_logits, plain_logp, plain_rows

import train_dpo
from data import CUT_OFF, collate, entropy_floor, is_exact, is_preferred, parse
from data import random_equations, random_pairs, seen_sums
from model import GPT, GPTConfig, answer, completion_logps, generate, load_checkpoint
from model import logratios_of, save_checkpoint
from plots.figures import STYLE
from plots.study import collapse, figures, frontier, interventions, judge, methods
from plots.study import rlhf, runs, tables
from train_sft import make_optimizers

SEEN = seen_sums(20)  # of the tiny models
VARIANTS, SHORT = interventions.VARIANTS, {"steps": 1, "batch-size": 4}
SMALL = {  # the whole study in seconds: module: its constants
    runs: {"SAMPLES": 5},
    train_dpo: {"EVEN_LOOKS": 1},
    methods: {"RATES": (3e-3,), "BEYOND": {}, "PAIRS": 20, "EQUATIONS": 20, "SEEDS": (1, 2, 3)},
    rlhf: {"STEPS": 2, "BATCH": 8, "LOOKS": (1,)},
    interventions: {"STEPS": 3, "BATCH": 8, "PAIRS": 20, "SEEDS": (1, 2, 3)}
    | {"VARIANTS": {x: VARIANTS[x] for x in ("offline", *figures.REMEDIES)}},
    collapse: {"SEEDS": (1,)}
    | {"CASES": {"narrow": {"width": 24} | SHORT, "a file": {"pairs in a file": 30} | SHORT}},
    judge: {"BETAS": (0.3, 2), "RATE_BETAS": (0.3,), "RATES": (3e-3, 3)}
    | {"SEEDS": (1, 2), "STEPS": 4, "PROMPTS": 3, "ANSWERS": 4, "SAMPLES": 5}
    | {"KINDS": (judge.ONLINE, judge.RLOO)},
}


@pytest.fixture(scope="module", autouse=True)
def sft(tmp_path_factory):
    """In the working folder there is a model a seed, near this one, as the study would train."""
    model = mixed_model(SEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("study"))
        for module, constants in SMALL.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        patch.setitem(STYLE, "figure.dpi", 30)
        runs.RUNS.mkdir(parents=True)
        for i, name in enumerate(("sft_0", "sft_1", "sft_2", "sft_3", "sft_24_1")):
            save_checkpoint(runs.RUNS / f"{name}.pt", changed(model, i), {}, [])
        yield model


def changed(model, seed):
    """A copy with other weights."""
    model, state = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.03 * torch.randn(p.shape, generator=state)
    return model


def test_preferred_shares_by_enumeration(sft):
    """A fresh model gives each of 13 tokens the same probability, so lengths tell the shares."""
    ways = [f"20={a}+{b}+{20 - a - b}" for a in range(1, 20) for b in range(1, 20 - a)]
    expected = sum(math.exp(plain_logp(sft, way)) for way in ways)
    assert frontier.preferred_shares(sft, 3)[-1].item() == pytest.approx(expected, rel=1e-4)
    model, rows = GPT(GPTConfig(1, 4, 1, max_sum=40)).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    shares, expected = frontier.preferred_shares(model, 3), [0.0] * 41
    assert sum(rows) == math.comb(40, 3) - math.comb(4, 3)  # up to 100 it would be 161,696
    for n in range(5, 41):
        for a, b in itertools.combinations(range(1, n), 2):
            expected[n] += 13.0 ** -len(f"{a}+{b - a}+{n - b}$")
    assert shares.tolist() == pytest.approx(expected[5:], rel=1e-4)


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
    assert frontier.best_of(halves, 2) == pytest.approx((0.75, 0.1308120), abs=1e-7)
    assert frontier.best_of(quarters, 3)[0] == pytest.approx(1 - 0.75**3)


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


def test_the_parts_of_the_margin_are_those_of_a_small_exact_distribution():
    """Two sums of three answers each; the policy's counts of ten answers are its probabilities."""
    counts = torch.tensor([[5, 2, 3], [1, 1, 8]])
    pi, ref = counts / 20, torch.tensor([[0.2, 0.2, 0.6], [0.5, 0.3, 0.2]]).double() / 2
    good = torch.tensor([[True, True, False], [True, False, False]])
    kls, (s, p) = [], [(model * good).sum() for model in (pi, ref)]
    for of, s_of, p_of in ((good, s, p), (~good, 1 - s, 1 - p)):
        kls.append((pi[of] / s_of * ((pi[of] / s_of) / (ref[of] / p_of)).log()).sum().item())
    odds = math.log(s / (1 - s)) - math.log(p / (1 - p))
    expected = {"z": odds + kls[0] - kls[1], "log-odds": odds, "preferred": kls[0]}
    drawn = (x.flatten().repeat_interleave(counts.flatten()) for x in ((pi / ref).log(), good))
    ratios, preferred, p = *drawn, 2 * (ref * good).sum(1)
    parts = frontier.split_z(ratios, preferred, p)
    assert parts == pytest.approx(expected | {"others": kls[1]}, abs=1e-6)
    assert frontier.split_z(ratios, preferred | True, p) == dict.fromkeys(parts)


def test_a_result_is_computed_once_and_never_half_written():
    computed = []
    for _ in "12":
        result = runs.kept("new/x", lambda: computed.append(1) or {"x": [1.5, None]})
    assert result == {"x": [1.5, None]} and len(computed) == 1
    with pytest.raises(ValueError):
        runs.kept("new/y", lambda: {"x": math.nan})
    assert [path.name for path in (runs.RUNS / "new").iterdir()] == ["x.json"]


def test_a_failing_run_is_named_at_once_and_an_interrupted_study_leaves_no_worker(tmp_path):
    """By Ctrl-C, which all processes hear, or from outside. A worker would hold the pipe open."""
    with ThreadPoolExecutor(2) as pool:
        futures = {"slow": pool.submit(time.sleep, 0.5), "bad": pool.submit(divmod, 1, 0)}
        with pytest.raises(RuntimeError, match="bad"):
            runs.gather("", futures)
        assert not futures["slow"].done()
    code = """import sys, time; from pathlib import Path; from plots.study import runs
runs.FOLDER, tasks = Path(), ([Path(sys.argv[1]).touch], [time.sleep, 20])
runs.run_part("part", lambda pool: runs.gather("", {i: pool.submit(*tasks[i]) for i in (0, 1)}))"""
    env = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": os.environ | env, "stderr": subprocess.PIPE}
    options["preexec_fn"] = lambda: os.setsid() or signal.signal(signal.SIGINT, signal.SIG_DFL)
    one, other = (subprocess.Popen([sys.executable, "-c", code, x], **options) for x in "ab")
    while len(os.listdir(tmp_path)) < 2:
        assert one.poll() is None and other.poll() is None
        time.sleep(0.02)
    os.killpg(one.pid, signal.SIGINT)
    other.terminate()
    for process in (one, other):
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 130 and b"Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_all_that_is_asked_of_a_model_is_that_of_plain_loops(sft):
    p, policy = frontier.preferred_shares(sft, 3), changed(sft, 7)
    result, rows, sides = methods.asked_of(policy, sft, p, 5, 8), [], []
    for x, *pair in random_pairs(random.Random(methods.PAIR_SEED), 20, SEEN, 3):
        ratios = [plain_logp(policy, x + side) - plain_logp(sft, x + side) for side in pair]
        sides.append([*ratios, -math.log(p[int(x[:-1]) - 5])])
        (last, before), (_, after) = plain_rows(policy, x + pair[1])[-2:]
        before, after = (list(map(math.exp, row)) for row in (before, after))
        rows.append((str(pair[1].count("+") + 1), {"end": after[12], "right digit": before[last]}))
    assert result["next token"].keys() == {"2", "4", "5"}
    for k, means in result["next token"].items():
        expected = {key: fmean(row[key] for terms, row in rows if terms == k) for key in means}
        assert means == pytest.approx(expected, abs=1e-5)
    expected = dict(zip(("chosen", "rejected", "ceiling"), map(fmean, zip(*sides))))
    assert result["offline pairs"] == pytest.approx(expected, abs=1e-4)
    eights = [n for n in range(5, 21) for _ in range(8)]
    drawn = answer(policy, eights, generator=torch.manual_seed(5))
    good = torch.tensor([is_preferred(equation, 3) for equation in drawn])
    ratios, state = logratios_of(policy, sft, drawn).double(), torch.manual_seed(5)
    assert result["kl parts"] == frontier.split_kl(ratios.view(16, 8), good.view(16, 8), p)
    assert result["wrong"] == runs.ways_to_miss(drawn)
    for name, sums in (("largest", [20] * 10), ("outside", methods.OUTSIDE)):
        assert result[name] == fmean(map(is_exact, answer(policy, sums * 8, generator=state)))


def shares(preferred, exact=0.9):
    return {"sampled": {"preferred": preferred, "exact": exact, "n": 1000}}


def test_a_method_that_is_best_at_an_edge_of_the_rates_gets_one_more(monkeypatch):
    """The results of all runs are there: most at the best rate, and less the farther it is.

    Within two standard errors, 0.027 for shares near 0.9 of 1000 each, the most exact is best.
    """
    tried = [("a", shares(0.9, 0.9)), ("b", shares(0.88, 0.95)), ("c", shares(0.87, 1.0))]
    assert methods.best_of(tried) == methods.best_of(tried[::-1]) == "b"
    monkeypatch.setattr(methods, "RATES", (1e-4, 3e-4, 1e-3, 3e-3))
    monkeypatch.setattr(methods, "BEYOND", {1e-4: 3e-5, 3e-3: 1e-2})
    best = {"low": 3e-5, "middle": 3e-4, "high": 3e-3, "higher": 1}
    monkeypatch.setattr(methods, "METHODS", {x: [{"m": x}, {"m": x, "b": 2}] for x in best})
    for name, lr, i in itertools.product(best, (3e-5, *methods.RATES, 1e-2, 3e-2), (0, 1)):
        result = shares(0.9 - 0.1 * abs(math.log(lr / best[name])) + 0.1 * i)
        runs.kept(runs.name_of(methods.METHODS[name][i] | {"lr": lr}, 0), result.copy)
    with ThreadPoolExecutor(1) as pool:
        tried = methods.choose(pool)
    for name, more in (("low", [3e-5]), ("middle", []), ("high", [1e-2]), ("higher", [1e-2])):
        grid = [s | {"lr": lr} for s in methods.METHODS[name] for lr in methods.RATES]
        grid += [{"m": name, "b": 2, "lr": lr} for lr in more]
        assert [settings for settings, _ in tried[name]] == grid


def plain_reward(model, equation):
    """Of one row that nothing fills up."""
    prompt, _, completion = equation.partition("=")
    text = f"{prompt:0>3}={completion}$".replace(CUT_OFF + "$", "")
    return plain_logits(model, [ALPHABET.index(c) for c in text])[-1, 0].item()


def test_the_learned_reward_and_its_optimum_by_hand(sft, monkeypatch):
    """Answers to each sum are weighed by exp(r / beta); the KL is the mean of log(n weight)."""
    monkeypatch.setattr(rlhf, "STEPS", 40)
    monkeypatch.setattr(rlhf, "REWARD_LR", 1e-2)
    rlhf.train_reward_model(model := copy.deepcopy(sft), 3)
    rows = "9= 3+3+3|20= 10+9+1|9= 4+5…|5= |20= 1+1+1+1+16|7= …".split("|")
    expected = [plain_reward(model, row.replace(" ", "")) for row in rows]
    rewards = rlhf.rewards_of(model, [row.split(" ") for row in rows])
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
    about = rlhf.about_rewards(model, sft, 4)
    for kind, examples in rlhf.kinds_of_answers(4, SEEN).items():
        right, three = "right" in kind, "3 terms" in kind
        assert all(is_exact(x + y) == right and (y.count("+") == 2) == three for x, y in examples)
        rewards = rlhf.rewards_of(model, examples)
        assert about[kind] == pytest.approx([rewards.mean().item(), rewards.std().item()])
    assert about["3 terms, right"][0] > about["other count, right"][0] + 0.5
    fives, found = [n for n in SEEN for _ in range(5)], {"preferred": 0, "exact": 0, "kl": 0}
    answers = answer(sft, fives, generator=torch.manual_seed(4))
    for five in zip(*[iter(answers)] * 5):
        factors = [math.exp(plain_reward(model, equation) / 0.8) for equation in five]
        for weight, equation in zip([x / sum(factors) for x in factors], five):
            found["preferred"] += weight * is_preferred(equation, 3) / len(SEEN)
            found["exact"] += weight * is_exact(equation) / len(SEEN)
            found["kl"] += weight * math.log(5 * weight) / len(SEEN)
    assert about["optimum"] == pytest.approx(found, abs=1e-5)


def test_small_pieces_by_hand():
    """The tokens that count, ways to miss a sum, and cells."""
    tokens, mask = collate([("43=", x) for x in ("4+5", "10+30+13", "20", "1+22")])
    kept = []
    for tokens_that_count, _ in list(VARIANTS.values())[:5]:
        rows = zip(tokens.tolist(), tokens_that_count(tokens, mask).tolist())
        kept.append(" ".join("".join(ALPHABET[t] for t, m in zip(*row) if m) for row in rows))
    expected = (
        "4+5$ 10+30+13$ 20$ 1+22$|4+5 10+30+13 20 1+22|4+ 10+30+1 2 1+2|4+ 10+30+  1+|$ $ $ $"
    )
    assert kept == expected.split("|")
    answers = ["9=4+5+1", "9=9+9", "9=3+3+3+4+5", "9=10", "9=3+3", "9=4+5", "9=+", "9=4" + CUT_OFF]
    assert list(runs.ways_to_miss(answers).values()) == pytest.approx([0.6, 0.2, 0.2])
    assert list(runs.ways_to_miss(answers[5:]).values()) == [0, 0, 0]
    values = [0.98765], [12.0, 13.0], [-1e-5], [1.0, None], [None]
    assert list(map(tables.cell, values)) == ["0.988", "12.5 ± 0.7", "0.000", "1.000", ""]
    assert tables.cell([12.0, None, 13.0], spread=False) == "12.5"
    assert tables.cells_of([{"x": None}], {"x": lambda r: r["x"]}, ["x"]) == [""]


def test_other_rejected_sides_have_the_terms_and_the_wrong_sums_that_they_should():
    rng = random.Random(0)
    pairs = random_pairs(rng, 1000, SEEN, 3)
    sides = {name: [side(rng, pair) for pair in pairs] for name, (_, side) in VARIANTS.items()}
    for name, terms in (("two terms", 2), ("four terms", 4), ("five terms", 5)):
        assert all(is_preferred(pair[0] + y, terms) for pair, y in zip(pairs, sides[name]))
    for name, share in (("half wrong sums", 0.5), ("nine in ten wrong sums", 0.9)):
        wrong = [parse(x + y) for (x, _, z), y in zip(pairs, sides[name]) if y != z]
        assert all(abs(sum(terms) - n) in (1, 2, 3, 10) for n, terms in wrong)
        of_wrong = len(wrong) / 1000, fmean(len(terms) == 3 for _, terms in wrong)
        assert of_wrong == pytest.approx((share, 0.5), abs=0.08)


def test_the_variant_offline_ends_in_the_weights_of_the_script():
    """In double precision. The loss and z at the end are those of other pairs."""
    flags = {"pairs": "offline", "lr": 3e-3, "steps": 3, "batch-size": 8, "seed": 2}
    flags["sft"] = runs.RUNS / "sft_2.pt"
    torch.set_default_dtype(torch.float64)
    try:
        by_script = load_checkpoint(runs.trained(train_dpo, "script", flags))[0]
        policy, reference = (load_checkpoint(flags["sft"])[0] for _ in "12")
    finally:
        torch.set_default_dtype(torch.float32)
    reached, z = interventions.train(policy, reference, "offline", 3e-3, 2), []
    for ours, theirs, start in zip(*(x.parameters() for x in (policy, by_script, reference))):
        assert (ours - theirs).abs().max() < 1e-9 < (theirs - start).abs().max()
    for x, *pair in random_pairs(random.Random(interventions.PAIR_SEED), 20, SEEN, 3):
        a, b = (plain_logp(policy, x + y) - plain_logp(reference, x + y) for y in pair)
        z.append(a - b)
    loss = fmean(math.log(1 + math.exp(-0.8 * margin)) for margin in z)
    assert reached == pytest.approx({"loss": loss, "z of pairs": fmean(z)})


@pytest.mark.parametrize("kind", ("online", "reference", "mixed", "rloo", "imitation"))
def test_training_with_a_noisy_judge_is_that_of_a_plain_loop(kind, sft):
    """The preferred of two answers wins with probability sigmoid(1), either of two equals 1/2."""
    trained, plain, reference = (copy.deepcopy(sft).double() for _ in "123")
    settings = getattr(judge, kind.upper()) | {"beta": 0.5, "steps": 6, "lr": 3e-3}
    judge.train(trained, reference, settings, 7)
    rng, _ = random.Random(7), torch.manual_seed(7)

    def next_loss():
        prompts = [f"{n}=" for n in rng.choices(SEEN, k=3) for _ in range(4)]
        if kind == "mixed":
            halves = generate(plain, prompts[::2]), generate(reference, prompts[1::2])
            written = list(itertools.chain(*zip(*halves)))
        else:
            written = generate(plain if kind in ("online", "rloo") else reference, prompts)
        batch, loss = collate(list(zip(prompts, written))), 0
        logps = completion_logps(plain, *batch)
        ratios = logps - completion_logps(reference, *batch).detach()
        good = [float(is_preferred(x + y, 3)) for x, y in zip(prompts, written)]
        returns = [x - 0.5 * ratio.item() for x, ratio in zip(good, ratios)]
        for i, j in itertools.permutations(range(12), 2):
            wins = (i // 4 == j // 4) / (1 + math.exp(good[j] - good[i]))
            if kind == "rloo":
                loss -= (i // 4 == j // 4) * (returns[i] - returns[j]) / 3 * logps[i] / 12
            elif kind == "imitation":
                loss -= wins * logps[i] / 18
            else:
                loss -= wins * F.logsigmoid(0.5 * (ratios[i] - ratios[j])) / 18
        return loss

    runs.train(make_optimizers(plain, 0), 3e-3, 6, next_loss)
    for ours, theirs, start in zip(*(x.parameters() for x in (trained, plain, sft))):
        assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


class Pool(ThreadPoolExecutor):
    def submit(self, task, *args):
        """Not before the SFT model of the run is there."""
        assert task is runs.sft or (runs.RUNS / f"sft_{args[-1]}.json").exists()
        return super().submit(task, *args)


@pytest.fixture(scope="module")
def study(sft):
    """All parts, twice: the second time from the files of the first. One method stands for all."""

    def times():
        return {path: path.stat().st_mtime_ns for path in runs.RUNS.rglob("*.*")}

    models, content = times(), {}
    for seed, settings in itertools.product(range(4), sum(methods.METHODS.values(), [])):
        result = methods.run({"pairs": "mistakes", "lr": 3e-3} | SHORT, seed)
        runs.kept(runs.name_of(settings | {"lr": 3e-3}, seed), result.copy)
    with Pool(1) as pool:
        for module in (methods, rlhf, interventions, collapse, judge):
            for path in runs.RUNS.glob("sft_?.json"):
                path.unlink()
            part = getattr(module, module.__name__.split(".")[-1])
            content[part.__name__], before = part(pool), times()
            assert json.dumps(part(pool)) == json.dumps(content[part.__name__])
            assert times() == before and before.items() >= models.items()
    return content


def test_every_part_has_all_its_runs_and_the_judge_its_optimum(study):
    def seeds_of(found):
        return [run["seed"] for run in found]

    sft, of_methods = study["methods"]["sft"], study["methods"]["methods"].values()
    with_kl, without_kl = (study["rlhf"][name] for name in ("runs", "without kl"))
    assert seeds_of(sft) == seeds_of(with_kl) == seeds_of(without_kl) == [1, 2, 3]
    assert with_kl[0]["kl"] != without_kl[0]["kl"]
    for method in of_methods:
        flags = [f"--{flag}={value}" for flag, value in method["settings"].items()]
        assert train_dpo.parse_args(flags) and seeds_of(method["runs"]) == [1, 2, 3]
        assert method["runs"][1]["kl"] != 0 == sft[1]["kl"] == method["runs"][1]["looks"][0]["kl"]
    equations = random_equations(random.Random(methods.EQUATION_SEED), 20, seen_sums())
    equations = ["".join(example) for example in equations]
    gap = -fmean(plain_logp(runs.start(2)[0], x) for x in equations) - entropy_floor(equations)
    assert sft[1]["gap"] == pytest.approx(gap, abs=1e-4)
    for rate, seeds in zip(interventions.RATES, ([1, 2, 3], [1])):
        variants = study["interventions"][str(rate)]
        assert [seeds_of(found) for found in variants.values()] == [seeds] * 3
        assert len({found[0]["z of pairs"] for found in variants.values()}) == 3
    (narrow,), (file,) = study["collapse"].values()
    assert narrow["gap"] != file["gap"] and narrow["kl"] != 0 != file["kl"]
    assert [len(found) for found in study["judge"].values()] == [6, 6, 5]
    for entry in study["judge"]["study"]:
        beta, loss, rate = (entry["settings"][key] for key in ("beta", "loss", "lr"))
        assert seeds_of(entry["runs"]) == [1, 2]
        assert loss == "imitation" or rate == 3e-3  # 3 destroys the model
        for run in entry["runs"]:
            p = runs.start(run["seed"])[2]
            s = p * math.exp(1 / beta) / (p * math.exp(1 / beta) + 1 - p)
            s = p * (p + 2 * (1 - p) / (1 + math.exp(-1))) if loss == "imitation" else s
            log_ratios = (p * (s / p).log(), p), ((1 - p) * ((1 - s) / (1 - p)).log(), 1 - p)
            z = [(weighted.sum() / weights.sum()).item() for weighted, weights in log_ratios]
            expected = s.mean().item(), frontier.bernoulli_kl(s, p).mean().item(), z[0] - z[1]
            assert tuple(run["predicted"].values()) == pytest.approx(expected, rel=1e-5)
            assert 0 <= run["preferred"] <= run["exact"] <= 1 and run["kl"] != 0


def test_all_tables_and_figures_are_made_or_none(study, tmp_path, monkeypatch):
    one, other = tmp_path / "a.md", tmp_path / "b.md"
    text = "kept\n" + "".join(f"<!-- table {x} -->\nOLD\n<!-- end -->\n" for x in tables.TABLES)
    for name, content in study.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    monkeypatch.setattr(tables, "PAGES", (one, other))
    for module in (tables, figures):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
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
    assert "| offline, IPO | 5.000 |" in page  # 1 / (2 beta)
    assert "| offline, smoothed | 2.747 |" in page  # log(0.9 / 0.1) / 0.8
    assert {x.stem for x in tmp_path.glob("*.png")} == {"frontier", "rewards", "rlhf", "judge"}


def test_differences_by_hand():
    """Differences c (m - 1), c m, c (m + 1) have t = m sqrt(3); Holm multiplies p by 6, 5, ...

    So p of 0.05, 0.01 and 0.001 become 0.1, 0.04 and 0.006.
    """
    for t, df, p in ((4.303, 2, 0.05), (9.925, 2, 0.01), (2.776, 4, 0.05), (-4.604, 4, 0.01)):
        assert tables.two_sided_p(t, df) == pytest.approx(p, abs=1e-4)

    def method(t):
        values = [0.5 + 0.01 * (t / math.sqrt(3) + i) * (t > 0) for i in (-1, 0, 1)]
        return {"runs": [shares(x) | {"kl parts": {"excess": x}} for x in values]}

    of_methods = {"a": method(4.303), tables.YARDSTICK: method(0), "b": method(9.925)}
    study = {"methods": {"methods": of_methods}, "rlhf": method(31.599)}  # of p = 0.001
    rows = [row.split(" | ") for row in tables.differences_table(study).splitlines()[2:]]
    for column in (1, 2):
        assert ["*" in row[column] for row in rows] == [False, True, True]
    assert [row[0][-1] for row in rows] == ["a", "b", "F"]
    assert rows[0][1] == "+0.025 [-0.000, +0.050]"  # 4.303 x 0.01 / sqrt(3)
