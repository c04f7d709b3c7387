"""The study: its frontier, parts, tables and figures, against closed forms and plain loops."""

import copy
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
from statistics import fmean, mean

import pytest
import torch
import torch.nn.functional as F
from conftest import ALPHABET, mixed_model, plain_logits, plain_logp, token_logps

import train_dpo
from data import (CUT_OFF, InputError, collate, entropy_floor, is_exact, is_preferred, measure,
                  parse, random_equations, random_pairs, read_pairs, seen_sums)  # fmt: skip
from model import (GPT, GPTConfig, answers_to, fingerprint, generate, load_checkpoint,
                   logratios_of, save_checkpoint)  # fmt: skip
from plots.figures import STYLE
from plots.study import collapse, figures, frontier, interventions, methods, rlhf, runs, tables
from train_sft import learning_rate

SEEN = seen_sums(20)  # of the tiny models
SEEDS = (1, 2, 3)
SHORT = {"steps": 1, "batch-size": 4}
SMALL = {  # the whole study in seconds: module: its constants
    runs: {"SAMPLES": 5, "SEEDS": SEEDS, "RATES": (3e-4, 1e-3)},
    train_dpo: {"EVEN_LOOKS": 1},
    methods: {
        "METHODS": {"offline + KL": {"pairs": "offline", "kl-weight": 0.1} | SHORT},
        "MORE_METHODS": {"online": {"pairs": "online"} | SHORT},
        "OFFLINE": {"pairs": "offline"} | SHORT,
        "CHANGES": [{"kl-weight": 0.03}, {"beta": 2}],
        "PAIRS": 20,
        "EQUATIONS": 20,
        "SEEDS": SEEDS,
    },
    rlhf: {"STEPS": 3, "BATCH": 8, "LOOKS": (1,), "SEEDS": SEEDS},
    interventions: {"STEPS": 3, "BATCH": 8, "PAIRS": 20, "SEEDS": SEEDS},
    collapse: {
        "CASES": {
            "five terms": {"preferred-terms": 5} | SHORT,
            "a file": {"pairs in a file": 30} | SHORT,
        }
    },
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
    """It gives each of 13 tokens the same probability."""
    shares = frontier.preferred_shares(GPT(GPTConfig(1, 4, 1, max_sum=40)).eval(), 3)
    for n, share in zip(range(5, 41), shares.tolist(), strict=True):
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


@pytest.mark.parametrize("kl_weight, beta", [(0.1, 0.8), (0.2, 0.8), (0.8, 0.8), (0.1, 5)])
def test_the_optimum_with_a_kl_is_that_of_a_search_over_shares(kl_weight, beta):
    """For one p, z = log-odds(s) - log-odds(p). With a small weight all answers are preferred."""
    p = 0.3
    s = torch.linspace(p, 1 - 1e-9, 1_000_000).double()
    z = s.logit() - math.log(p / (1 - p))
    kl = frontier.bernoulli_kl(s, torch.tensor(p).double())
    best = (F.softplus(-beta * z) + kl_weight * kl).argmin()
    found = frontier.optimum_with_kl(torch.tensor([p]).double(), kl_weight, beta)
    assert found == pytest.approx((s[best].item(), kl[best].item()), abs=1e-5)
    assert (found[0] > 0.999) == ((kl_weight, beta) == (0.1, 0.8))


def test_the_curve_goes_from_the_reference_to_the_end_and_has_the_best_of_n():
    curve = methods.curve([[0.25] * 96, [0.5] * 96])
    shares, kls = zip(*curve["curve"])
    assert (shares[0], kls[0]) == pytest.approx((0.375, 0), abs=1e-9)
    assert (shares[-1], kls[-1]) == pytest.approx((1, (math.log(4) + math.log(2)) / 2), abs=1e-3)
    assert max(b - a for a, b in zip(shares, shares[1:])) < 0.05
    (n, share, kl), *others = curve["best of n"]
    assert (n, share) == (2, (1 - 0.75**2 + 0.75) / 2) and [x[0] for x in others] == [4, 8, 16]
    assert kl == pytest.approx(
        mean(frontier.best_of_n(torch.tensor([p]), 2)[1] for p in (0.25, 0.5))
    )


def test_the_parts_of_the_kl_are_unbiased():
    """Of 10,000 repetitions of 20 samples, within 0.003 nats; the bias would be over 0.01.

    Four sums have six answers each, of which the first two are preferred.
    """
    torch.manual_seed(5)
    ref, pi = torch.distributions.Dirichlet(torch.full((6,), 4.0).double()).sample((2, 4))
    pi[:, :2] *= torch.tensor([1.5, 2, 2.5, 3])[:, None]
    pi /= pi.sum(1, keepdim=True)
    s, p, ratios = pi[:, :2].sum(1), ref[:, :2].sum(1), (pi / ref).log()
    truth = {"preferred": (pi * (ratios - (s / p).log()[:, None]))[:, :2].sum(1)}
    truth["others"] = (pi * (ratios - ((1 - s) / (1 - p)).log()[:, None]))[:, 2:].sum(1)
    truth["excess"] = (pi * ratios).sum(1) - frontier.frontier_kl(p, s.mean().item())
    truth = {name: x.mean().item() for name, x in truth.items()}
    drawn = torch.multinomial(pi.repeat(10_000, 1), 20, True)
    sampled = ratios.repeat(10_000, 1).gather(1, drawn)
    parts = frontier.split_kl(sampled, drawn < 2, p.repeat(10_000))
    assert parts == pytest.approx(truth, abs=0.003) and min(truth.values()) > 0.03
    for good, none in ((True, "others"), (False, "preferred")):
        assert frontier.split_kl(sampled[:4], torch.full((4, 20), good), p)[none] == 0


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


def test_the_hash_of_code_changes_with_what_a_file_and_its_imports_do(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "FOLDER", tmp_path / "plots" / "study")
    part, imported, other = (tmp_path / f"{name}.py" for name in ("part", "imported", "other"))
    part.write_text("from imported import x")
    hashes = []
    for file, line in ((imported, "x = 1"), (other, "x = 1"), (part, "# x"), (imported, "x = 2")):
        with file.open("a") as code:
            code.write(f"\n\n{line}\n")
        hashes.append(runs.hash_of_code.__wrapped__(str(part)))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


def divide(x, y):
    return x / y


def test_a_failing_run_is_named():
    with ThreadPoolExecutor(2) as pool, pytest.raises(RuntimeError, match="1_0"):
        runs.gather(pool, "", divide, {"good": [(1, 2)], "bad": [(1, 0)]})


INTERRUPTED = """
import signal
import time
from pathlib import Path
from data import run_script
from plots.study import runs

def work(pool):
    futures = pool.submit(Path("started").touch), pool.submit(time.sleep, 60)
    return [future.result() for future in futures]

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
run_script(lambda: runs.write_part("part", work))
"""


def test_an_interrupted_study_leaves_no_worker(tmp_path):
    """By Ctrl-C, which all processes hear. A worker would hold the pipe of errors."""
    env = os.environ | {"PYTHONPATH": str(tables.PAGES[0].parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=tmp_path, env=env, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


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
    drawn = answers_to(policy, fives, generator=torch.manual_seed(seed))
    good = torch.tensor([is_preferred(equation, 3) for equation in drawn])
    ratios = logratios_of(policy, sft, drawn)
    assert result["sampled"] == measure(drawn, 3) and result["seed"] == seed
    assert result["kl"] == pytest.approx(ratios.mean().item())
    assert result["kl parts"] == frontier.split_kl(ratios.view(16, 5), good.view(16, 5), p)
    held_out = [is_exact(x) for n, x in zip(fives, drawn) if n not in SEEN]
    assert result["held out"] == fmean(held_out)
    largest = answers_to(policy, [20] * 1000, generator=torch.manual_seed(seed))
    assert result["largest"] == fmean(map(is_exact, largest))
    assert len(runs.own_answers(policy, sft, 0)[0]) == len(drawn) / 5


def test_the_gap_of_sft_and_a_lost_checkpoint():
    """A checkpoint that was deleted is trained again, though its kept results are there."""
    equations = random_equations(random.Random(methods.EQUATION_SEED), 20, seen_sums())
    equations = ["".join(example) for example in equations]
    gap = -fmean(plain_logp(runs.start(2)[0], x) for x in equations) - entropy_floor(equations)
    assert methods.run_sft(2)["gap"] == pytest.approx(gap, abs=1e-4)
    runs.kept(runs.sft, 3)
    path = runs.RUNS / "sft_3.pt"
    before = path.read_bytes()
    path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.train_sft, "main", lambda args: Path(args.out).write_bytes(before))
        assert fingerprint(runs.start(3)[0]) == fingerprint(load_checkpoint(path)[0])


def test_every_rate_is_tried_and_the_most_preferred_one_is_taken(monkeypatch):
    """Most are preferred at the best rate, and fewer the farther it is."""
    monkeypatch.setattr(runs, "RATES", (1e-5, 1e-4, 1e-3, 1e-2))
    best = {"low": 1e-5, "middle": 1e-4, "high": 1}

    def run(settings, seed):
        distance = abs(math.log(settings["lr"] / best[settings["m"]]))
        shares = {"preferred": 0.7 - 0.01 * distance, "exact": settings["lr"]}
        return {"sampled": shares, "run": [settings, seed]}

    with ThreadPoolExecutor(1) as pool:
        rows = runs.at_best_rate(pool, run, {name: {"m": name} for name in best}, (4, 2))
    for name, row in rows.items():
        settings = {"m": name, "lr": min(best[name], 1e-2)}
        assert row["settings"] == settings
        assert [lr for lr, *_ in row["tried"]] == [lr for _, _, lr in row["tried"]] == [*runs.RATES]
        of_seed_0 = [run({"m": name, "lr": lr}, 0)["sampled"]["preferred"] for lr in runs.RATES]
        assert [preferred for _, preferred, _ in row["tried"]] == of_seed_0
        assert [result["run"] for result in row["results"]] == [[settings, 4], [settings, 2]]


# ---- RLHF ------------------------------------------------------------------------------------


def plain_reward(model, equation):
    """Of one row that nothing fills up."""
    prompt, _, completion = equation.partition("=")
    text = f"{prompt:0>3}={completion}$".replace(CUT_OFF + "$", "")
    return plain_logits(model, [ALPHABET.index(c) for c in text])[-1, 0].item()


@pytest.fixture(scope="module")
def reward_model():
    """It has learned for some steps, at a high rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf, "STEPS", 40)
        patch.setattr(rlhf, "REWARD_LR", 1e-2)
        model = rlhf.new_reward_model(1)
        rlhf.train_reward_model(model, 3)
    return model


def test_rewards_are_those_of_the_last_tokens_and_learned_from_the_pairs(reward_model):
    equations = ["9=3+3", "20=10+9+1", "9=4+5…", "5=", "20=1+1+1+1+16", "7=…"]
    examples = [(f"{n}=", side) for n, side in (equation.split("=") for equation in equations)]
    expected = [plain_reward(reward_model, equation) for equation in equations]
    assert rlhf.rewards_of(reward_model, examples).tolist() == pytest.approx(expected, abs=1e-5)
    means = {}
    for kind, examples in rlhf.kinds_of_answers(4, SEEN).items():
        right, three = "exact" in kind, "3 terms" in kind
        assert all(is_exact(x + y) == right and (y.count("+") == 2) == three for x, y in examples)
        means[kind] = rlhf.rewards_of(reward_model, examples).mean().item()
    assert means["3 terms, exact"] > means["other count, exact"] + 0.5


def plain_steps(policy, lr, steps, loss_of_step):
    """AdamW steps down these losses, at the rates of train_dpo.py."""
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = learning_rate(lr, step, steps, 0.7)
        optimizer.zero_grad()
        loss_of_step().backward()
        optimizer.step()


def assert_same_weights(trained, plain, start):
    """But for rounding; training has moved them."""
    for x, y, before in zip(*(model.parameters() for model in (trained, plain, start))):
        assert (x - y).abs().max() < 1e-7 < 1e-4 < (y - before).abs().max()


def test_the_policy_of_rlhf_learns_as_in_a_plain_loop(sft, reward_model):
    """By its reward minus beta times its log-ratio, from answers to the sums that training sees."""
    trained, plain, reference = (copy.deepcopy(sft).double() for _ in range(3))
    reward_model = copy.deepcopy(reward_model).double()
    settings = {"beta": 0.3, "lr": 2e-3}
    path = rlhf.train_policy(trained, reference, reward_model, settings, 7)
    assert [look["step"] for look in path] == [0, 1]
    torch.manual_seed(7)
    rng = random.Random(7)

    def loss():
        prompts = [f"{n}=" for n in rng.choices(SEEN, k=8)]
        answers = [x + y for x, y in zip(prompts, generate(plain, prompts))]
        logps, terms = [token_logps(plain, x).sum() for x in answers], []
        gains = [
            plain_reward(reward_model, x) - 0.3 * (now.item() - plain_logp(reference, x))
            for x, now in zip(answers, logps)
        ]
        for i in range(8):
            others = fmean(gains[:i] + gains[i + 1 :])
            terms.append(-(gains[i] - others) * logps[i])
        return sum(terms) / 8

    plain_steps(plain, 2e-3, 3, loss)
    assert_same_weights(trained, plain, sft)


# ---- interventions ---------------------------------------------------------------------------


def test_the_tokens_of_rejected_sides_that_count(sft):
    """Those below one half are found one by one."""
    equations = [f"20={side}" for side in ("4+5", "10+30+13", "20", "1+22")]
    tokens, mask = collate([("20=", equation[3:]) for equation in equations])
    unlikely = [
        "".join(
            c for c, logp in zip(equation[3:] + "$", token_logps(sft, equation)) if logp.exp() < 0.5
        )
        for equation in equations
    ]
    expected = {
        interventions.all_tokens: ["4+5$", "10+30+13$", "20$", "1+22$"],
        interventions.all_but_last_term: ["4+$", "10+30+$", "$", "1+$"],
        interventions.first_terms: ["4+", "10+30+", "", "1+"],
        interventions.last_term: ["5", "13", "20", "22"],
        interventions.end_token: ["$", "$", "$", "$"],
        interventions.unlikely_tokens: unlikely,
    }
    for tokens_that_count, texts in expected.items():
        rows = zip(tokens.tolist(), tokens_that_count(tokens, mask, sft).tolist())
        kept = ["".join(ALPHABET[t] for t, counts in zip(*row) if counts) for row in rows]
        assert kept == texts
    assert {function for function, _ in interventions.VARIANTS.values()} == expected.keys()


def test_half_of_the_rejected_sides_have_a_wrong_sum():
    rng = random.Random(0)
    pairs = random_pairs(rng, 1000, SEEN, 3)
    sides = [interventions.half_wrong_sums(rng, pair) for pair in pairs]
    wrong = [parse(x + side) for (x, _, other), side in zip(pairs, sides) if side != other]
    assert all(abs(sum(terms) - n) in (1, 2, 3, 10) for n, terms in wrong)
    assert len(wrong) / 1000 == pytest.approx(0.5, abs=0.08)
    assert fmean(len(terms) == 3 for _, terms in wrong) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("variant", ["offline", "tokens below one half", "half wrong sums"])
def test_interventions_train_as_a_plain_loop(sft, variant):
    """The tokens that count do so in policy and reference alike. z at the end is of other pairs."""
    trained, plain, reference = (copy.deepcopy(sft).double() for _ in range(3))
    z = interventions.train(trained, reference, variant, 2e-3, 7)
    rng, rng_of_sides = random.Random(7), random.Random(7)

    def zs_of(pairs):
        for x, chosen, rejected in pairs:
            if variant == "half wrong sums":
                rejected = interventions.half_wrong_sums(rng_of_sides, (x, chosen, rejected))
            right, wrong = (
                token_logps(plain, x + y) - token_logps(reference, x + y).detach()
                for y in (chosen, rejected)
            )
            if variant == "tokens below one half":
                wrong = wrong[token_logps(reference, x + rejected).exp() < 0.5]
            yield right.sum() - wrong.sum()

    def loss():
        zs = list(zs_of(random_pairs(rng, 8, SEEN, 3)))
        return sum(F.softplus(-0.8 * z) for z in zs) / 8

    plain_steps(plain, 2e-3, 3, loss)
    assert_same_weights(trained, plain, sft)
    others = random_pairs(random.Random(interventions.PAIR_SEED), 20, SEEN, 3)
    assert z == pytest.approx(fmean(z.item() for z in zs_of(others)))


# ---- the whole study -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    """All parts, twice: the second time from the files of the first."""
    content = {}
    with ThreadPoolExecutor(1) as pool:
        for module in (methods, rlhf, interventions, collapse):
            part = getattr(module, module.__name__.split(".")[-1])
            content[part.__name__] = json.loads(json.dumps(part(pool)))
            files = {path: path.stat().st_mtime_ns for path in runs.RUNS.rglob("*.*")}
            assert json.loads(json.dumps(part(pool))) == content[part.__name__]
            assert files == {path: path.stat().st_mtime_ns for path in runs.RUNS.rglob("*.*")}
    return content


def test_every_part_has_all_rows_rates_and_seeds(study):
    of_methods = study["methods"]["methods"]
    assert of_methods.keys() == methods.METHODS.keys() | methods.MORE_METHODS.keys()
    assert study["rlhf"]["methods"].keys() == {"RLHF", "RLHF without the KL"}
    assert {"offline", *study["interventions"]} == interventions.VARIANTS.keys()
    assert study["collapse"].keys() == collapse.CASES.keys()
    for part in (of_methods, study["rlhf"]["methods"], study["interventions"], study["collapse"]):
        for row in part.values():
            assert [lr for lr, *_ in row["tried"]] == [*runs.RATES]
            assert row["settings"]["lr"] in runs.RATES
            assert [result["seed"] for result in row["results"]] == [*SEEDS]
            assert len({result["kl"] for result in row["results"]} - {0}) == len(SEEDS)
        ends = {json.dumps(row["results"]) for row in part.values()}
        assert len(ends) == len(part)
    for seed, rewards, result in zip(SEEDS, study["rlhf"]["rewards"], study["methods"]["sft"]):
        assert rewards == rlhf.learn_rewards(seed)
        assert result["p"] == frontier.preferred_shares(runs.start(seed)[1], 3).tolist()
    (results,) = study["methods"]["default rate"].values()
    assert results[0]["looks"][0]["kl"] == 0 != results[0]["kl"]
    assert [x["settings"] for x in study["methods"]["changes"]] == methods.CHANGES
    of_rates = study["methods"]["offline at every rate"]
    assert [x["settings"]["lr"] for x in of_rates] == [*runs.RATES]
    for row in (*study["methods"]["changes"], *of_rates):
        assert [result["seed"] for result in row["results"]] == [*SEEDS]
    for result in study["collapse"]["five terms"]["results"]:
        assert result["sampled"]["preferred"] == result["sampled"]["exact_counts"].get("5", 0)


def test_every_run_starts_from_the_sft_model_of_its_seed_with_its_settings(study):
    """What the checkpoints say, which the scripts have written."""
    names, defaults = [], train_dpo.parse_args([])
    for path in set(runs.RUNS.glob("*.pt")) - set(runs.RUNS.glob("sft_*.pt")):
        _, args, _ = load_checkpoint(path)
        sft = load_checkpoint(runs.RUNS / f"sft_{args['seed']}.pt")[0]
        assert args["reference"] == fingerprint(sft) and path.stem.endswith(f"_{args['seed']}")
        settings = {"steps": 1, "batch-size": 4, "lr": args["lr"], "kl-weight": args["kl_weight"]}
        settings["beta"] = args["beta"]
        if "file" in path.stem:
            expected = random_pairs(random.Random(args["seed"]), 30, seen_sums(), 3)
            assert read_pairs(args["pairs"], 100, 3) == expected
        for flag, value in settings.items():
            default = getattr(defaults, flag.replace("-", "_"))
            assert (f"{flag}={value:g}" in path.stem) or value == default
        names.append(path.stem)
    assert len(names) == 2 * (2 + 3) + 3 * (1 + 2) + 3 * 2 + 2 * (2 + 3)


# ---- the pages -------------------------------------------------------------------------------

PUBLISHED = tables.read_study()


def test_all_tables_and_figures_are_made_or_none(tmp_path, monkeypatch):
    one, other = tmp_path / "a.md", tmp_path / "b.md"
    text = "kept\n" + "".join(f"<!-- table {x} -->\nOLD\n<!-- end -->\n" for x in tables.TABLES)
    monkeypatch.setattr(tables, "PAGES", (one, other))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="make methods"):
        tables.main()
    for name, content in PUBLISHED.items():
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
    assert tables.fill(page, PUBLISHED) == page
    assert {x.stem for x in tmp_path.glob("*.png")} == {"frontier", "rates", "rewards", "rlhf"}


def percent(row, metric):
    return 100 * fmean(result["sampled"][metric] for result in row)


def test_the_figures_show_what_is_in_the_json():
    """The numbers are read back from the axes."""
    rows, results = tables.rows_of(PUBLISHED), tables.results_of(PUBLISHED)
    for axes, column in zip(figures.draw_rates(rows).axes, (1, 2)):
        shown = axes.images[0].get_array().tolist()
        for values, row, frame in zip(shown, rows.values(), axes.patches, strict=True):
            assert values == [100 * of_rate[column] for of_rate in row["tried"]]
            assert figures.RATES[round(frame.get_x() + 0.5)] == row["settings"]["lr"]
    for axes in figures.draw_frontier(PUBLISHED, results).axes:
        points = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xydata()) == 1]
        for name in tables.NEEDS:
            kl = fmean(result["kl"] for result in results[name])
            assert pytest.approx((kl, percent(results[name], "preferred"))) in points, name
    axes = figures.draw_frontier(PUBLISHED, results).axes[0]
    for name in figures.WITH_PATH:
        path = [[look["kl"], 100 * look["preferred"]] for look in results[name][0]["looks"]]
        assert path in [line.get_xydata().tolist() for line in axes.lines]
    (axes,) = figures.draw_rewards(results).axes
    shown = [line.get_xydata().tolist() for line in axes.lines]
    for i, name in enumerate(figures.WITH_REWARDS):
        for side in ("chosen", "rejected"):
            rewards = [[0.8 * r["offline pairs"][side], i] for r in results[name]]
            assert rewards in shown
    names = "SFT", "offline", "offline + KL", "RLHF", "RLHF without the KL"
    for axes, name in zip(figures.draw_same_pairs(results).axes, names, strict=True):
        bars = {round(bar.get_x() + 0.4): bar.get_height() for bar in axes.patches}
        of_three = 100 * fmean(r["sampled"]["exact_counts"].get("3", 0) for r in results[name])
        assert bars[3] == pytest.approx(of_three)


def test_cells_by_hand():
    values = [0.98765], [12.0, 13.0], [-1e-5], [1.0, None], [None]
    assert list(map(tables.cell, values)) == ["0.988", "12.5 ± 0.7", "0.000", "1.000", ""]
    assert tables.cell([12.0, None, 13.0], spread=False) == "12.5"
    assert tables.cells_of([{"x": None}], {"x": lambda r: r["x"]}, ["x"]) == [""]
    rates = [tables.rate_of({"settings": {"lr": lr}}) for lr in (3e-6, 1e-3, 1e-2)]
    assert rates == ["3e-6 (lowest)", "1e-3", "1e-2 (highest)"]


def test_paired_differences_by_hand():
    """Differences of 1, 2 and 3: mean 2, standard error 1 / sqrt(3), times 4.30265."""
    ones, others = [5, 7, 9], [4, 5, 6]
    assert tables.paired(float, ones, others) == "+2.000 [-0.484, +4.484]"
    five = tables.paired(float, [1, 2, 3, 4, 5], [0] * 5)  # 2.77645 sqrt(2.5 / 5) = 1.963
    assert five == "+3.000 [+1.037, +4.963]"
