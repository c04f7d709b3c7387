"""The DPO loss against worked numbers, the pairs of every source, and bad flags."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from data import END, PAD, PROMPT_WIDTH, InputError, collate, decode, is_preferred, parse
from data import random_pairs, seen_sums
from model import GPT, GPTConfig, completion_logps, generate
from train_dpo import SAMPLED, diagnosis, dpo_loss, judged_answers, own_answers, pair_batches
from train_dpo import parse_args

MAX_SUM = 20
SUMS = seen_sums(MAX_SUM).tolist()

# ---- the loss --------------------------------------------------------------------------------

# Log-probs of three pairs, so that z = log-ratio of chosen minus that of rejected is 2, -2 and 0:
# (-12 - -13) - (-15 - -14) = 2; (-20 - -19) - (-18 - -19) = -2; (-5 - -5) - (-5 - -5) = 0.
POLICY_CHOSEN, POLICY_REJECTED = [-12.0, -20.0, -5.0], [-15.0, -18.0, -5.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -19.0, -5.0], [-14.0, -19.0, -5.0]


def four():
    rows = (POLICY_CHOSEN, POLICY_REJECTED, REF_CHOSEN, REF_REJECTED)
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


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
    losses, *_ = dpo_loss(*four(), beta, label_smoothing=0.1)
    assert losses.tolist() == pytest.approx(expected, abs=1e-8)


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


@pytest.mark.parametrize("beta", [0.8, 0.1])
def test_imitation_is_the_surprise_of_the_chosen_side_for_any_beta(beta):
    losses, chosen_rewards, rejected_rewards = dpo_loss(*four(), beta, loss="sft")
    assert losses.tolist() == [12, 20, 5]
    assert chosen_rewards.tolist() == pytest.approx([beta, -beta, 0])
    assert rejected_rewards.tolist() == pytest.approx([-beta, beta, 0])


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
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    """About a third each of its answers have three terms, are right with two, and are wrong."""
    return taught(
        [(f"{n}=", c) for n in SUMS for c in (f"1+2+{n - 3}", f"{n - 1}+1", f"1+{n - 2}")]
    )


@pytest.fixture
def file(tmp_path):
    """Fourteen pairs of a file, and its path."""
    pairs = random_pairs(np.random.default_rng(7), 14, SUMS, 3)
    path = tmp_path / "given.jsonl"
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, pair))) + "\n" for pair in pairs))
    return pairs, str(path)


def batches(flags, policy, reference, rank=0, world=1, steps=3):
    args = parse_args([str(flag) for flag in flags])
    return list(itertools.islice(pair_batches(args, policy, reference, rank, world), steps))


def texts(batch, rows=slice(None)):
    """(prompt, completion) of rows of a batch."""
    parts = [decode(row).partition("=") for row in batch.tokens[rows].tolist()]
    return [(n + equals, completion) for n, equals, completion in parts]


SOURCES = [
    ["--pairs", "offline", "--preferred-terms", 4],
    ["--pairs", "online"],
    ["--pairs", "online", "--nll-weight", 1, "--preferred-terms", 2],
    ["--pairs", "reference"],
    ["--pairs", "on-policy", "--answers", 3, "--preferred-terms", 2],
    ["--pairs", "FILE"],
]


def name(flags):
    return " ".join(map(str, flags))


def given(flags, path):
    return [path if flag == "FILE" else flag for flag in flags]


@pytest.mark.parametrize("flags", SOURCES, ids=name)
def test_a_preferred_answer_is_chosen_above_one_that_is_not(flags, trained, file):
    """To the same prompt, never a held-out one; and the mask covers what tokens it should."""
    terms = flags[-1] if "--preferred-terms" in flags else 3
    for batch in batches([*given(flags, file[1]), "--batch-size", 32], trained, trained):
        assert {prompt for prompt, _ in texts(batch)} <= {f"{n}=" for n in SUMS}
        chosen, rejected = texts(batch, batch.chosen), texts(batch, batch.rejected)
        assert len(chosen) == len(rejected) > 5
        for (prompt, good), (same_prompt, bad) in zip(chosen, rejected):
            assert prompt == same_prompt
            assert is_preferred(prompt + good, terms) and not is_preferred(prompt + bad, terms)
        for row, mask in zip(batch.tokens.tolist(), batch.completion_mask.tolist()):
            end = row.index(END) if END in row else sum(mask) + PROMPT_WIDTH - 1
            assert mask == [PROMPT_WIDTH <= t <= end for t in range(len(row))]
            assert set(row[end + 1 :]) <= {PAD}
        rows = {*batch.chosen.tolist(), *batch.rejected.tolist(), *batch.anchor.tolist()}
        assert rows == set(range(len(batch.tokens)))  # no row goes through the model for nothing


@pytest.mark.parametrize("flags", SOURCES, ids=name)
def test_the_anchor_is_what_is_chosen_or_all_that_is_written(flags, trained, file):
    for batch in batches([*given(flags, file[1]), "--batch-size", 24], trained, trained):
        if "--nll-weight" in flags:
            anchor = texts(batch, batch.anchor)
            assert len(anchor) == len(set(batch.anchor.tolist())) == 24 > len(batch.chosen)
            assert all(is_preferred(prompt + written, 2) for prompt, written in anchor)
            assert set(batch.chosen.tolist()) <= set(batch.anchor.tolist())
        else:
            assert torch.equal(batch.anchor, batch.chosen)


def test_sampled_sources_ask_the_right_model(trained, clueless):
    """Without a preferred answer the judge decides nothing, and there is no pair."""
    for pairs, policy, reference in (
        ("reference", clueless, trained),
        ("on-policy", trained, clueless),
    ):
        flags = ["--pairs", pairs, "--batch-size", 16]
        assert all(len(batch.chosen) > 0 for batch in batches(flags, policy, reference))
        for batch in batches(flags, reference, policy):
            assert len(batch.tokens) == len(batch.chosen) == len(batch.anchor) == 0
            assert completion_logps(policy, *batch[:2]).shape == (0,)


def test_online_pairs_reject_every_mistake_of_the_policy_as_it_is_now(trained, clueless):
    """A clueless policy gives a pair a prompt, a better one fewer; its answers are its own."""
    flags = ["--pairs", "online", "--batch-size", 200]
    [worst], [better] = (batches(flags, model, clueless, steps=1) for model in (clueless, trained))
    assert len(worst.chosen) == 200 and 80 < len(better.chosen) < 180
    prompts = [f"{n}=" for n in np.random.default_rng(0).choice(SUMS, 200)]
    assert [prompt for prompt, _ in texts(worst, worst.chosen)] == prompts
    tokens, _ = generate(clueless, prompts, generator=torch.Generator().manual_seed(0))
    assert [decode(row) for row in worst.tokens[worst.rejected].tolist()] == [
        decode(row) for row in tokens.tolist()
    ]


def test_online_pairs_of_a_policy_without_a_mistake():
    """No pair is left, and a batch of none goes through the model; the anchor stays."""
    flawless = taught([(f"{n}=", f"1+2+{n - 3}") for n in SUMS])
    for weight, anchors in ((0, 0), (1, 4)):
        flags = ["--pairs", "online", "--batch-size", 4, "--nll-weight", weight]
        drawn = batches(flags, flawless, flawless, steps=20)
        without_pairs = [batch for batch in drawn if len(batch.chosen) == 0]
        assert len(without_pairs) > 2
        for tokens, mask, chosen, rejected, anchor in without_pairs:
            logps = completion_logps(flawless, tokens, mask)
            assert logps[chosen].shape == logps[rejected].shape == (0,)
            assert logps.shape == logps[anchor].shape == (anchors,)


@pytest.mark.parametrize(
    "flags",
    [
        ["--pairs", "offline"],
        ["--pairs", "online"],
        ["--pairs", "online", "--nll-weight", 1],
        ["--pairs", "reference", "--judge-reward", 1],
        ["--pairs", "on-policy", "--answers", 3, "--judge-reward", 1],
        ["--pairs", "FILE"],
    ],
    ids=name,
)
def test_two_processes_together_hold_what_one_alone_draws(flags, clueless, file):
    """Whole pairs where both sides are written; written answers, or prompts, where some are not.

    A clueless model, and a judge that decides between equals, leave no prompt without a pair.
    """

    def drawn(batch):
        chosen, rejected = texts(batch, batch.chosen), texts(batch, batch.rejected)
        if flags[1] in SAMPLED:
            return [prompt for prompt, _ in chosen]
        return texts(batch, batch.anchor) if flags[1] == "online" else list(zip(chosen, rejected))

    all_flags = [*given(flags, file[1]), "--batch-size", 6, "--seed", 3]
    whole, part, rest = (
        [drawn(batch) for batch in batches(all_flags, clueless, clueless, rank, world)]
        for rank, world in ((0, 1), (0, 2), (1, 2))
    )
    for together, one, other in zip(whole, part, rest):
        assert len(one) == len(other) >= 3 and sorted(one + other) == sorted(together)


@pytest.mark.parametrize("source", ["offline", "online", "reference"])
def test_processes_and_seeds_draw_unlike_answers(source):
    """An untrained model is uniform, so its answers show the random numbers, whatever is asked."""
    uniform = GPT(GPTConfig(max_sum=MAX_SUM)).eval()
    flags = ["--pairs", source, "--batch-size", 8]
    flags += ["--judge-reward", 1] if source in SAMPLED else []
    seen = []
    for seed, rank in itertools.product((0, 1, 0), (0, 1)):
        [batch] = batches([*flags, "--seed", seed], uniform, uniform, rank, 2, steps=1)
        sampled = texts(batch)[-4:]  # whatever is written comes before
        seen.append(str([completion for _, completion in sampled]))
    assert len(set(seen)) == 4 and seen[:2] == seen[4:]


def test_pairs_of_a_file_come_once_a_round_over_two_processes(clueless, file):
    """Fourteen pairs, four a step: two rounds end in step 7, the first in the middle of one."""
    pairs, path = file
    flags = ["--pairs", path, "--batch-size", 4]
    both = (batches(flags, clueless, clueless, rank, world=2, steps=7) for rank in (0, 1))
    stream = []
    for steps in zip(*both):
        for row in (0, 1):
            for batch in steps:
                [(prompt, chosen)] = texts(batch, batch.chosen[row : row + 1])
                [(_, rejected)] = texts(batch, batch.rejected[row : row + 1])
                stream.append((prompt, chosen, rejected))
    assert sorted(stream[:14]) == sorted(stream[14:]) == sorted(pairs)
    assert stream[:14] != stream[14:]


def test_answers_of_a_file_that_the_model_has_no_room_for_are_refused(clueless, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "9=", "chosen": "3+3+3", "rejected": "1+" * 7 + "2"}))
    with pytest.raises(InputError, match="rejected must be at most 14 characters"):
        batches(["--pairs", path], clueless, clueless)


def judged(flags, model, asked):
    """Pairs by `judged_answers`, and all the answers, four to a prompt, that were compared."""
    args = parse_args(["--pairs", "on-policy", "--answers", "4", *flags])
    coins = np.random.default_rng(0).random((len(asked), 6))
    batch = judged_answers(args, model, torch.Generator().manual_seed(5), asked, coins)
    prompts = [f"{n}=" for n in asked for _ in range(4)]
    tokens, _ = generate(model, prompts, generator=torch.Generator().manual_seed(5))
    return batch, [decode(row) for row in tokens.tolist()]


def test_a_judge_that_never_errs_pairs_all_unequal_answers(trained):
    """Against a plain loop over every two of the four answers to a prompt."""
    batch, answers = judged([], trained, SUMS * 3)
    expected, rows = [], 0
    for i in range(0, len(answers), 4):
        good = [answer for answer in answers[i : i + 4] if is_preferred(answer, 3)]
        bad = [answer for answer in answers[i : i + 4] if not is_preferred(answer, 3)]
        expected += itertools.product(good, bad)
        rows += 4 if good and bad else 0
    found = zip(texts(batch, batch.chosen), texts(batch, batch.rejected))
    assert sorted(("".join(c), "".join(r)) for c, r in found) == sorted(expected)
    assert len(batch.tokens) == rows < len(answers)


def test_a_judge_that_errs_compares_every_two_answers_once(trained):
    batch, answers = judged(["--judge-reward", "1"], trained, SUMS)
    assert ["".join(text) for text in texts(batch)] == answers
    compared = Counter(map(frozenset, zip(batch.chosen.tolist(), batch.rejected.tolist())))
    assert compared == Counter(
        frozenset(two)
        for i in range(0, len(answers), 4)
        for two in itertools.combinations(range(i, i + 4), 2)
    )


@pytest.mark.parametrize("reward, wins", [(1, 0.731059), (3, 0.952574)])
def test_a_judge_that_errs_does_so_as_bradley_and_terry_say(trained, reward, wins):
    """A preferred answer wins with probability sigmoid(R), equals with 1/2: 5 standard errors."""
    flags = ["--pairs", "on-policy", "--answers", 4, "--judge-reward", reward]
    [batch] = batches([*flags, "--batch-size", 800], trained, trained, steps=1)
    good = torch.tensor([is_preferred(p + completion, 3) for p, completion in texts(batch)])
    good_chosen, good_rejected = good[batch.chosen], good[batch.rejected]
    first_chosen = batch.chosen < batch.rejected
    for event, among, probability in (
        (good_chosen, good_chosen != good_rejected, wins),
        (first_chosen, good_chosen & good_rejected, 0.5),
        (first_chosen, ~good_chosen & ~good_rejected, 0.5),
    ):
        n, share = among.sum().item(), event[among].double().mean().item()
        assert n > 300
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / n)


# ---- flags, measurements, the last line ------------------------------------------------------


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--nll-weight -1", "--nll-weight is a number from 0"),
        ("--nll-weight inf", "--nll-weight is a number from 0"),
        ("--answers 1 --pairs on-policy", "--answers is at least 2"),
        ("--answers 3 --pairs offline", "are for --pairs reference and on-policy"),
        ("--judge-reward 1 --pairs online", "are for --pairs reference and on-policy"),
        ("--judge-reward 0 --pairs reference", "--judge-reward: invalid positive_float value"),
        ("--label-smoothing 0.5", "--label-smoothing is a share from 0 to below 0.5"),
        ("--label-smoothing -0.1", "--label-smoothing is a share from 0 to below 0.5"),
        ("--label-smoothing 0.1 --loss ipo", "for --loss sigmoid alone"),
        ("--beta nan", "--beta: invalid positive_float value: 'nan'"),
        ("--out runs/../runs/sft.pt", "would replace a file of --sft or --pairs"),
        ("--sft a.pt --out ./a.pt", "would replace a file of --sft or --pairs"),
        ("--pairs a.jsonl --out a.pt", "would replace a file of --sft or --pairs"),
    ],
)
def test_bad_flags_are_refused(flags, complaint, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(flags.split())
    assert error.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("terms, rank, world", [(2, 0, 1), (3, 1, 2), (4, 1, 2)])
def test_own_answers_are_shares_of_all_prompts(trained, clueless, terms, rank, world):
    """Against a plain count of a process's part: five samples of each sum, held-out ones too."""
    prompts = [f"{n}=" for n in range(5, MAX_SUM + 1)] * 5
    generator = torch.Generator().manual_seed(1_000_005 + rank)
    batch = generate(trained, prompts[rank::world], generator=generator)
    totals = Counter()
    for answer in (decode(row) for row in batch[0].tolist()):
        totals["preferred"] += is_preferred(answer, terms)
        if (found := parse(answer)) is not None:
            totals["parsed"] += 1
            totals["form"] += len(found[1]) == terms
            totals["exact"] += sum(found[1]) == found[0]
    with torch.no_grad():
        logps, ref_logps = (completion_logps(model, *batch) for model in (trained, clueless))
    totals["kl"] = (logps - ref_logps).sum().item()
    expected = {f"own/{name}": pytest.approx(total / 80) for name, total in totals.items()}
    assert own_answers(trained, clueless, terms, rank, world) == expected
    assert (terms == 4) or 0 < totals["preferred"] < totals["form"]
    assert totals["exact"] < totals["parsed"] and totals["kl"] > 0


def test_diagnosis_names_the_outcome_and_the_cure():
    def end(preferred, exact, pairs):
        first = {"own/preferred": 0.23, "own/exact": 0.97, "own/kl": 0.0}
        last = {"own/preferred": preferred, "own/exact": exact, "own/kl": 10.0}
        return diagnosis(first, last, pairs)

    facts = "0.23 -> 0.44 are preferred and 0.97 -> 0.31 exact, at 10.00 nats from the reference"
    broken = end(0.44, 0.31, "offline")
    assert facts in broken and "\n" not in broken
    assert broken.endswith("no pair mentions; try --pairs online or --nll-weight 1.")
    assert end(0.44, 0.31, "online").endswith("no pair mentions; try a lower --lr.")
    assert "not learned yet; try more --steps" in end(0.5, 0.97, "online")
    assert end(0.98, 0.99, "online").endswith("from the reference.")
