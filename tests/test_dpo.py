"""The preference losses against worked numbers, the pairs of every source, the looks."""

import random

import pytest
import torch
from conftest import mixed_model, plain_logp, random_model

import train_dpo
from data import CUT_OFF, END, collate, is_preferred, mark, measure, random_pairs, seen_sums
from model import completion_logps, generate
from train_dpo import SOURCES, dpo_loss, look, own_answers_loss

SUMS = seen_sums(20)

# Log-probs of three pairs, so that z = log-ratio of chosen minus that of rejected is 2, -2 and 0:
# (-12 - -13) - (-15 - -14) = 2; (-20 - -19) - (-18 - -19) = -2; (-5 - -5) - (-5 - -5) = 0.
POLICY_CHOSEN, POLICY_REJECTED = [-12.0, -20.0, -5.0], [-15.0, -18.0, -5.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -19.0, -5.0], [-14.0, -19.0, -5.0]


@pytest.mark.parametrize(
    "beta, smoothing, ipo, expected",
    [
        # -log sigmoid(0.8 * 2) = log(1 + exp(-1.6)) = 0.18390074; 1.6 more at z = -2; log 2 at 0
        (0.8, 0, False, [0.18390074, 1.78390074, 0.69314718]),
        (0.1, 0, False, [0.59813887, 0.79813887, 0.69314718]),
        # 0.9 of the loss above and 0.1 of it with z turned round, 1.6 (or 0.2) more or less
        (0.8, 0.1, False, [0.34390074, 1.62390074, 0.69314718]),
        (0.1, 0.1, False, [0.61813887, 0.77813887, 0.69314718]),
        # (z - 1 / 1.6)^2 = (2 - 0.625)^2 = 1.890625; with beta 0.1 the target is 5
        (0.8, 0, True, [1.890625, 6.890625, 0.390625]),
        (0.1, 0, True, [9, 49, 25]),
    ],
)
def test_golden_numbers(beta, smoothing, ipo, expected):
    """A reward is beta times a log-ratio, and no gradient flows through it."""
    rows = POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED
    four = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in rows]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*four, beta, smoothing, ipo)
    assert losses.tolist() == pytest.approx(expected, abs=1e-8) and losses.requires_grad
    assert chosen_rewards.tolist() == pytest.approx([beta, -beta, 0])
    assert rejected_rewards.tolist() == pytest.approx([-beta, beta, 0])
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_sigmoid_loss_stays_finite_where_sigmoid_underflows():
    zero, far = torch.zeros(1), torch.full((1,), -200.0)
    assert dpo_loss(far, zero, zero, zero, 1.0)[0].item() == pytest.approx(200.0)
    assert dpo_loss(zero, far, zero, zero, 1.0)[0].item() == pytest.approx(0.0, abs=1e-30)


def only_ones(seed):
    """A model that writes 1s and then the end, so that all its answers can be listed."""
    model = random_model(seed).double()
    model.norm.bias.data[0] = 50.0  # so the first column of the head is a bias
    model.head.weight.data[:, 0] = -2.0
    model.head.weight.data[[1, END], 0] = 0.0
    return model


def objective(policy, reference, kl_weight, reward):
    """The exact kl_weight KL(pi || pi_ref) - E[reward] over all answers to 9=."""
    most = policy.config.block_size - 4
    examples = [("9=", "1" * k) for k in range(most)] + [("9=", "1" * most + CUT_OFF)]
    logps, ref_logps = (completion_logps(x, *collate(examples)) for x in (policy, reference))
    assert logps.exp().sum().item() == pytest.approx(1)
    return (logps.exp() * (kl_weight * (logps - ref_logps) - reward(examples))).sum()


def test_own_answers_loss_has_the_gradient_of_the_exact_kl_and_reward():
    """Of 2,000 answers, to a fifth of its length; and a step against it lowers the objective."""

    def reward(examples):
        return torch.tensor([-len(completion) / 2 for _, completion in examples]).double()

    torch.manual_seed(0)
    policy, reference = only_ones(1), only_ones(2)
    parameters = [p for p in policy.parameters() if p.ndim == 2]
    for rewards in (reward, lambda examples: 0):
        exact = objective(policy, reference, 0.7, rewards)
        loss = own_answers_loss(policy, reference, ["9="] * 2000, 0.7, rewards)
        gradients = [torch.autograd.grad(x, parameters) for x in (exact, loss)]
        expected, found = (torch.cat([g.flatten() for g in gradient]) for gradient in gradients)
        assert (found - expected).norm() < 0.2 * expected.norm()
    with torch.no_grad():
        for p, gradient in zip(parameters, gradients[1]):
            p -= 1e-3 * gradient
    assert objective(policy, reference, 0.7, rewards) < exact


@pytest.fixture(scope="module")
def clueless():
    """Hardly an answer is an equation, and none is preferred."""
    return random_model()


@pytest.fixture(scope="module")
def trained():
    return mixed_model(SUMS)


def drawn(count, terms=3):
    return random_pairs(random.Random(7), count, SUMS, terms)


@pytest.mark.parametrize("terms", [2, 3])
def test_mistakes_are_the_answers_of_the_policy_that_are_not_preferred(trained, clueless, terms):
    """As they are now: a clueless policy gives a pair a prompt, a better one fewer."""
    written = drawn(100, terms)
    for policy, reference in ((trained, clueless), (clueless, trained)):
        torch.manual_seed(3)
        pairs = SOURCES["mistakes"](written, policy, reference, terms)
        torch.manual_seed(3)
        answers = generate(policy, [prompt for prompt, _, _ in written])
        expected = [(p, chosen, x) for (p, chosen, _), x in zip(written, answers)]
        assert pairs == [(p, c, x) for p, c, x in expected if not is_preferred(p + x, terms)]
        assert len(pairs) == 100 if policy is clueless else 5 < len(pairs) < 95


@pytest.mark.parametrize("terms", [2, 3])
def test_judged_pairs_are_two_answers_of_the_right_model(trained, clueless, terms):
    """Without a preferred answer the judge decides nothing, and there is no pair."""
    written = drawn(100, terms)
    prompts = [prompt for prompt, _, _ in written]
    torch.manual_seed(3)
    answers = list(zip(prompts, generate(trained, prompts), generate(trained, prompts)))
    good = [tuple(is_preferred(p + side, terms) for side in two) for p, *two in answers]
    assert set(good) == {(True, False), (False, True), (True, True), (False, False)}
    expected = []
    for (prompt, one, other), (one_is_good, other_is_good) in zip(answers, good):
        if one_is_good and not other_is_good:
            expected.append((prompt, one, other))
        if other_is_good and not one_is_good:
            expected.append((prompt, other, one))
    sources = (("reference", clueless, trained), ("online", trained, clueless))
    for name, policy, reference in sources:
        torch.manual_seed(3)
        assert SOURCES[name](written, policy, reference, terms) == expected
        assert SOURCES[name](written, reference, policy, terms) == []


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_a_look_measures_answers_to_every_sum(trained, clueless, terms, capsys):
    """Several samples of each sum, held-out ones too, and three to show."""
    own = look(trained, clueless, terms, 7)
    prompts = [f"{n}=" for n in [*range(5, 21)] * train_dpo.LOOK_SAMPLES + [20, 11, 9]]
    generator = torch.Generator().manual_seed(train_dpo.LOOK_SEED)
    answers = generate(trained, prompts, generator=generator)
    equations = [prompt + answer for prompt, answer in zip(prompts, answers)]
    ratios = [plain_logp(trained, x) - plain_logp(clueless, x) for x in equations]
    kl = sum(ratios) / len(ratios)
    assert own == measure(equations, terms) | {"kl": pytest.approx(kl, rel=1e-4)}
    assert own["n"] == len(prompts) == 3 * 16 + 3 and 0 < own["exact"] < 1 and own["kl"] > 0
    shown = capsys.readouterr().out
    assert all(mark(equation, terms) in shown for equation in equations[-3:])
    assert look(clueless, clueless, terms, 7)["kl"] == 0
