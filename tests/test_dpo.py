"""The preference losses against worked numbers, the pairs of every source, the looks."""

import functools
import json
from collections import Counter

import numpy as np
import pytest
import torch

import train_dpo
from data import collate, is_preferred, measure, parse, random_pairs, seen_sums
from model import GPT, GPTConfig, completion_logps, fingerprint, generate, load_checkpoint
from model import save_checkpoint
from train_dpo import SOURCES, dpo_loss, ipo_loss, look

MAX_SUM = 20
SUMS = seen_sums(MAX_SUM).tolist()

# ---- the losses ------------------------------------------------------------------------------

# Log-probs of three pairs, so that z = log-ratio of chosen minus that of rejected is 2, -2 and 0:
# (-12 - -13) - (-15 - -14) = 2; (-20 - -19) - (-18 - -19) = -2; (-5 - -5) - (-5 - -5) = 0.
POLICY_CHOSEN, POLICY_REJECTED = [-12.0, -20.0, -5.0], [-15.0, -18.0, -5.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -19.0, -5.0], [-14.0, -19.0, -5.0]


def four():
    rows = (POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED)
    return [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows]


SMOOTH = functools.partial(dpo_loss, label_smoothing=0.1)


@pytest.mark.parametrize(
    "loss, beta, expected",
    [
        # -log sigmoid(0.8 * 2) = log(1 + exp(-1.6)) = 0.18390074; 1.6 more at z = -2; log 2 at 0
        (dpo_loss, 0.8, [0.18390074, 1.78390074, 0.69314718]),
        (dpo_loss, 0.1, [0.59813887, 0.79813887, 0.69314718]),
        # 0.9 of the loss above and 0.1 of it with z turned round, 1.6 (or 0.2) more or less
        (SMOOTH, 0.8, [0.34390074, 1.62390074, 0.69314718]),
        (SMOOTH, 0.1, [0.61813887, 0.77813887, 0.69314718]),
        # (z - 1 / 1.6)^2 = (2 - 0.625)^2 = 1.890625; with beta 0.1 the target is 5
        (ipo_loss, 0.8, [1.890625, 6.890625, 0.390625]),
        (ipo_loss, 0.1, [9, 49, 25]),
    ],
)
def test_golden_numbers(loss, beta, expected):
    """A reward is beta times a log-ratio, and no gradient flows through it."""
    losses, chosen_rewards, rejected_rewards = loss(*four(), beta)
    assert losses.tolist() == pytest.approx(expected, abs=1e-8) and losses.requires_grad
    assert chosen_rewards.tolist() == pytest.approx([beta, -beta, 0])
    assert rejected_rewards.tolist() == pytest.approx([-beta, beta, 0])
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_sigmoid_loss_stays_finite_where_sigmoid_underflows():
    zero, far = torch.zeros(1), torch.full((1,), -200.0)
    assert dpo_loss(far, zero, zero, zero, 1.0)[0].item() == pytest.approx(200.0)
    assert dpo_loss(zero, far, zero, zero, 1.0)[0].item() == pytest.approx(0.0, abs=1e-30)


# ---- where pairs come from -------------------------------------------------------------------


def clueless_model():
    """Random weights: hardly an answer is an equation, and none is preferred."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=MAX_SUM)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def clueless():
    return clueless_model()


def taught(examples):
    """A model that has learned to answer just so, almost."""
    model, batch = clueless_model(), collate(examples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        (-completion_logps(model, *batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def trained():
    """About a third each of its answers have three terms, are right with two, and are wrong."""
    forms = (lambda n: f"1+2+{n - 3}", lambda n: f"{n - 1}+1", lambda n: f"1+{n - 2}")
    return taught([(f"{n}=", form(n)) for n in SUMS for form in forms])


@pytest.fixture(scope="module")
def flawless():
    """Every answer to a seen sum is preferred."""
    model = taught([(f"{n}=", f"1+2+{n - 3}") for n in SUMS])
    with torch.no_grad():
        model.head.weight.mul_(4)  # what is likely becomes all but certain
    return model


def drawn(count, terms=3):
    return random_pairs(np.random.default_rng(7), count, SUMS, terms)


@pytest.mark.parametrize("terms", [2, 3])
@pytest.mark.parametrize("name", SOURCES)
def test_a_preferred_answer_is_chosen_above_one_that_is_not(name, terms, trained):
    """To the same prompt; and no prompt comes more often than it was drawn."""
    written = drawn(100, terms)
    pairs, unpaired = SOURCES[name](written, trained, trained, terms)
    assert len(pairs) > 20 and len(set(pairs)) > 10
    for prompt, chosen, rejected in pairs:
        assert is_preferred(prompt + chosen, terms) and not is_preferred(prompt + rejected, terms)
    examples = [(prompt, chosen) for prompt, chosen, _ in pairs] + unpaired
    prompts = Counter(prompt for prompt, _ in examples)
    assert prompts <= Counter(prompt for prompt, _, _ in written)
    if name in ("offline", "mistakes"):
        assert Counter(examples) == Counter(written_pair[:2] for written_pair in written)
    assert (len(unpaired) > 5) == (name == "mistakes")
    assert (pairs == written) == (name == "offline")


def test_mistakes_are_the_answers_of_the_policy_that_are_not_preferred(trained, clueless):
    """As they are now: a clueless policy gives a pair a prompt, a better one fewer."""
    written = drawn(100)
    for policy, reference in ((trained, clueless), (clueless, trained)):
        torch.manual_seed(3)
        pairs, unpaired = SOURCES["mistakes"](written, policy, reference, 3)
        torch.manual_seed(3)
        answers = generate(policy, [prompt for prompt, _, _ in written])
        expected = [(p, chosen, x) for (p, chosen, _), x in zip(written, answers)]
        assert pairs == [(p, c, x) for p, c, x in expected if not is_preferred(p + x, 3)]
        assert unpaired == [(p, c) for p, c, x in expected if is_preferred(p + x, 3)]
        assert (len(pairs) == 100) == (policy is clueless)


def test_judged_pairs_are_two_answers_of_the_right_model(trained, clueless):
    """Without a preferred answer the judge decides nothing, and there is no pair."""
    prompts = [prompt for prompt, _, _ in drawn(100)]
    torch.manual_seed(3)
    answers = list(zip(prompts, generate(trained, prompts), generate(trained, prompts)))
    good = [[is_preferred(p + side, 3) for side in two] for p, *two in answers]
    expected = []
    for (prompt, one, other), (a, b) in zip(answers, good):
        expected += [(prompt, one, other)] if a > b else [(prompt, other, one)] if a < b else []
    sources = (("reference", clueless, trained), ("online", trained, clueless))
    for name, policy, reference in sources:
        torch.manual_seed(3)
        assert SOURCES[name](drawn(100), policy, reference, 3) == (expected, [])
        assert SOURCES[name](drawn(100), reference, policy, 3) == ([], [])
    assert {(True, False), (False, True), (True, True), (False, False)} == set(map(tuple, good))


def test_no_prompts_give_no_pairs(trained):
    for source in SOURCES.values():
        assert source([], trained, trained, 3) == ([], [])


# ---- runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["mistakes", "online", "reference"])
def test_a_flawless_policy_gives_no_pair_and_stays_as_it_is(pairs, flawless, tmp_path):
    """Unless --nll-weight holds up the answers that it gets right."""
    save_checkpoint(str(tmp_path / "sft.pt"), flawless, {}, [])
    for weight in ("0", "0.5"):
        flags = f"--steps 3 --batch-size 4 --lr 1e-4 --pairs {pairs} --nll-weight {weight}".split()
        paths = ["--sft", f"{tmp_path}/sft.pt", "--out", f"{tmp_path}/out.pt"]
        train_dpo.main(train_dpo.parse_args(flags + paths))
        model, args = load_checkpoint(f"{tmp_path}/out.pt")
        assert args["reference"] == fingerprint(flawless) and args["batch_size"] == 4
        learns = pairs == "mistakes" and weight == "0.5"
        assert (fingerprint(model) == fingerprint(flawless)) == (not learns)
        log = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        steps = [record for record in log if "own" not in record]
        assert [record["pairs"] for record in steps] == [0, 0, 0]
        assert not any("loss" in record or "rewards/chosen" in record for record in steps)


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_a_look_measures_answers_to_every_sum(trained, clueless, terms):
    """Against a plain count: several samples of each sum, held-out ones too, and three to show."""
    own, marks = look(trained, clueless, terms)
    prompts = [f"{n}=" for n in range(5, MAX_SUM + 1)] * train_dpo.LOOK_SAMPLES
    prompts += ["20=", "11=", "9="]
    generator = torch.Generator().manual_seed(train_dpo.LOOK_SEED)
    answers = generate(trained, prompts, generator=generator)
    equations = [prompt + answer for prompt, answer in zip(prompts, answers)]
    results = [parse(equation) or (0, [1]) for equation in equations]
    exact = [len(numbers) for n, numbers in results if n == sum(numbers)]
    with torch.no_grad():
        batch = collate(list(zip(prompts, answers)))
        logps, ref_logps = (completion_logps(model, *batch) for model in (trained, clueless))
    kl = pytest.approx((logps - ref_logps).mean().item())
    assert own == measure(equations, terms) | {"kl": kl}
    assert own["n"] == len(prompts) and own["exact"] == pytest.approx(len(exact) / len(prompts))
    assert own["preferred"] == pytest.approx(exact.count(terms) / len(prompts))
    assert [mark.split()[1] for mark in marks] == equations[-3:]
    assert own["kl"] > 0 and look(clueless, clueless, terms)[0]["kl"] == 0
