"""The DPO loss against worked numbers, and the pairs it is fed."""

import math

import numpy as np
import pytest
import torch

from data import InputError, decode, is_preferred
from model import GPT, GPTConfig, completion_logps
from train_dpo import (
    diagnosis,
    dpo_loss,
    given_pairs,
    online_pairs,
    paired,
    reference_pairs,
    shuffled_forever,
    stack,
)

# Log-probs of three pairs, so that z = log-ratio of chosen minus that of rejected is 2, -2 and 0:
# (-12 - -13) - (-15 - -14) = 2; (-20 - -19) - (-18 - -19) = -2; (-5 - -5) - (-5 - -5) = 0.
POLICY_CHOSEN, POLICY_REJECTED = [-12.0, -20.0, -5.0], [-15.0, -18.0, -5.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -19.0, -5.0], [-14.0, -19.0, -5.0]


def four(dtype=torch.float64):
    return [
        torch.tensor(x, dtype=dtype)
        for x in (POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED)
    ]


@pytest.mark.parametrize(
    "beta, expected",
    [
        # -log sigmoid(0.8 * 2) = log(1 + exp(-1.6)) = 0.18390074; 1.6 more at z = -2; log 2 at 0
        (0.8, [0.18390074, 1.78390074, 0.69314718]),
        (0.1, [0.59813887, 0.79813887, 0.69314718]),
    ],
)
def test_sigmoid_loss_golden_numbers(beta, expected):
    losses, chosen_rewards, rejected_rewards = dpo_loss(*four(), beta)
    assert losses.tolist() == pytest.approx(expected, abs=1e-8)
    assert chosen_rewards.tolist() == pytest.approx([beta, -beta, 0])
    assert rejected_rewards.tolist() == pytest.approx([-beta, beta, 0])


@pytest.mark.parametrize(
    "beta, expected",
    [
        # 0.9 of the loss above and 0.1 of it with z turned round, 1.6 (or 0.2) more or less
        (0.8, [0.34390074, 1.62390074, 0.69314718]),
        (0.1, [0.61813887, 0.77813887, 0.69314718]),
    ],
)
def test_label_smoothing_golden_numbers(beta, expected):
    assert dpo_loss(*four(), beta, label_smoothing=0.1)[0].tolist() == pytest.approx(
        expected, abs=1e-8
    )


@pytest.mark.parametrize(
    "beta, expected",
    [
        # (z - 1 / 1.6)^2 = (2 - 0.625)^2 = 1.890625; with beta 0.1 the target is 5
        (0.8, [1.890625, 6.890625, 0.390625]),
        (0.1, [9.0, 49.0, 25.0]),
    ],
)
def test_ipo_golden_numbers(beta, expected):
    losses, chosen_rewards, _ = dpo_loss(*four(), beta, loss="ipo")
    assert losses.tolist() == pytest.approx(expected, abs=1e-8)
    assert chosen_rewards.tolist() == pytest.approx([beta, -beta, 0])


def test_sigmoid_loss_gradient():
    """d loss / d chosen = -beta sigmoid(-beta z): -0.8 sigmoid(-1.6) = -0.13438529, and so on."""
    policy_chosen, policy_rejected, *ref = four()
    policy_chosen.requires_grad_(), policy_rejected.requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(policy_chosen, policy_rejected, *ref, 0.8)
    losses.sum().backward()
    expected = [-0.13438529, -0.66561471, -0.4]
    assert policy_chosen.grad.tolist() == pytest.approx(expected, abs=1e-8)
    assert policy_rejected.grad.tolist() == pytest.approx([-x for x in expected], abs=1e-8)
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad


def test_loss_stays_finite_where_sigmoid_underflows():
    zero, far = torch.zeros(1), torch.full((1,), -200.0)
    assert dpo_loss(far, zero, zero, zero, 1.0)[0].item() == pytest.approx(200.0)
    assert dpo_loss(zero, far, zero, zero, 1.0)[0].item() == pytest.approx(0.0, abs=1e-30)


def test_loss_is_log_2_when_policy_and_reference_agree():
    logps = torch.randn(2, 100)
    losses, *_ = dpo_loss(logps[0], logps[1], logps[0], logps[1], 0.8)
    assert torch.allclose(losses, torch.full((100,), math.log(2)))


def random_model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, heads=2)).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_stacked_pairs_have_the_logps_of_each_side_alone():
    pairs = [("9=", "3+3+3", "4+5"), ("100=", "10+20+70", "20+20+20+20+20")]
    model = random_model()
    chosen, rejected = given_pairs(pairs)
    tokens, completion_mask = stack(chosen, rejected, torch.device("cpu"))
    together = completion_logps(model, tokens, completion_mask)
    alone = torch.cat([completion_logps(model, *chosen), completion_logps(model, *rejected)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert [decode(row) for row in tokens.tolist()] == [
        "9=3+3+3",
        "100=10+20+70",
        "9=4+5",
        "100=20+20+20+20+20",
    ]


def test_preferred_means_right_and_of_the_preferred_count():
    assert is_preferred("9=3+3+3", 3) and is_preferred("9=4+5", 2)
    for equation in ("9=4+5", "9=3+3+4", "9=9=9", "9=3+3+3…"):
        assert not is_preferred(equation, 3)


def test_online_pairs_reject_the_policys_own_answers():
    """An untrained model prefers nothing: each of its answers comes back, beside a right one."""
    model, sums = random_model(), np.array([9, 100, 43])
    generator = torch.Generator().manual_seed(0)
    failing = np.full(3, 0.5)
    chosen, rejected = online_pairs(
        model, np.random.default_rng(0), generator, sums, failing, 50, 3
    )
    assert (failing > 0.5).all()
    assert len(chosen[0]) == len(rejected[0]) == 50
    for good, bad in zip(chosen[0].tolist(), rejected[0].tolist()):
        assert is_preferred(decode(good), 3) and not is_preferred(decode(bad), 3)
        assert decode(good).split("=")[0] == decode(bad).split("=")[0]


def test_a_step_without_pairs_is_a_step_with_zero_gradient():
    """Without a mistake there is no pair, and a batch of none must still go through."""
    model = random_model()
    tokens, completion_mask = stack(given_pairs([])[0], given_pairs([])[1], torch.device("cpu"))
    logps = completion_logps(model, tokens, completion_mask)
    loss = dpo_loss(logps, logps, logps, logps, 0.8)[0].sum() / 8
    loss.backward()
    assert loss.item() == 0 and all(
        p.grad is None or p.grad.count_nonzero() == 0 for p in model.parameters()
    )


def test_pairs_of_a_file_come_once_a_round():
    pairs = [("9=", str(i), "") for i in range(1, 6)]
    stream = shuffled_forever(pairs, np.random.default_rng(0))
    rounds = [[next(stream) for _ in pairs] for _ in range(3)]
    assert all(sorted(one) == pairs for one in rounds) and rounds[0] != rounds[1]


def test_answers_are_paired_preferred_above_the_rest_each_used_once():
    answers = ["9=4+5", "9=3+3+3", "9=3+3+4", "9=1+2+6", "9=2+3+4", "9=4+", "9=4+5…"]
    assert paired(answers, 3) == [("9=", "3+3+3", "4+5"), ("9=", "1+2+6", "3+3+4")]
    assert paired(["9=4+5"], 3) == []
    with pytest.raises(InputError, match="no preferred answer"):
        reference_pairs(
            random_model(), np.random.default_rng(0), torch.Generator(), np.array([9]), 3
        )


def record(step, margin, accuracy, preferred, exact, kl):
    return {
        "step": step,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy,
        "own/preferred": preferred,
        "own/exact": exact,
        "own/kl": kl,
    }


def test_diagnosis_names_the_outcome_and_the_cure():
    start = {"step": 0, "own/preferred": 0.23, "own/exact": 0.97, "own/kl": 0.0}
    broken = diagnosis([start, record(9, 12.0, 1.0, 0.44, 0.31, 10.0)], "offline")
    assert "margin 12.0, pair accuracy 1.00" in broken and "0.97 -> 0.31" in broken
    assert "try --pairs online" in broken and "\n" not in broken
    assert "try a lower --lr" in diagnosis(
        [start, record(9, 12.0, 1.0, 0.44, 0.31, 10.0)], "online"
    )
    assert "not learned yet" in diagnosis([start, record(9, 0.1, 0.6, 0.5, 0.97, 0.5)], "online")
    assert "is learned" in diagnosis([start, record(9, -1.0, 0.3, 0.98, 0.99, 1.6)], "online")
