"""The training loops against loops written out here, one sequence at a time.

All of it in double precision: two ways to the same sum then differ by some 1e-16, which neither
AdamW's division by tiny gradients nor Muon's by tiny singular values makes visible.
"""

import json
import random
from statistics import fmean

import pytest
import torch
from conftest import mixed_model, token_logps

import train_dpo
import train_sft
from data import entropy_floor, is_exact, random_equations, random_pairs
from model import GPT, GPTConfig, answers_to, load_checkpoint, logps_of, save_checkpoint

SFT = "--depth 2 --width 16 --heads 2 --max-sum 20 --batch-size 8 --seed 5 --lr 0.006"
DPO = "--sft start.pt --steps 4 --batch-size 8 --beta 0.3 --seed 5 --lr 0.003"
SEEN = [5, 8, 11, 14, 17, 20]  # 6, 7, 9, 10, 12, 13, 15, 16, 18 and 19 are held out
SAME, MOVED = 1e-9, 1e-3  # differences of weights: at most by rounding, and as training does
PAIRS = "9= 3+3+3 4+5|17= 5+5+7 17|20= 1+1+18 4+4+4+4+4|100=  ++|6= 2+2+2 1+1+1+1+2"
PAIRS = [tuple(line.split(" ")) for line in PAIRS.split("|")]
LOGGED = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
LOGGED += ["logps/chosen", "logps/rejected"]  # of every pair, in this order in dpo_by_hand


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """It holds a file of pairs, and a model to start from."""
    torch.set_default_dtype(torch.float64)
    folder = tmp_path_factory.mktemp("loops")
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))) for pair in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    save_checkpoint(folder / "start.pt", mixed_model(SEEN), {}, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_sft, "LOOKS", 10)
        yield
    torch.set_default_dtype(torch.float32)


def train(flags, out):
    """The args of a run, the weights it saves and its log."""
    script = train_dpo if "--sft" in flags else train_sft
    args = script.parse_args([*flags.split(), "--out", str(out)])
    script.main(args)
    checkpoint = torch.load(out)
    assert checkpoint["args"].items() >= vars(args).items()
    return args, checkpoint["model"], checkpoint["log"]


def distance(one, other):
    assert one.keys() == other.keys()
    return torch.stack([(one[name] - other[name]).abs().max() for name in one]).max()


def untrained(args):
    """The model a run starts from."""
    if "sft" in args:
        return load_checkpoint(args.sft)[0]
    torch.manual_seed(args.seed)
    return GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum))


def logp(model, prompt, completion):
    return token_logps(model, prompt + completion).sum()


def update(rates, loss, parameters, optimizers):
    """One step by gradients of this loss alone, with a rate for each optimizer."""
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    for rate, optimizer in zip(rates, optimizers):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def sft_by_hand(args):
    """The weights at the end, and the log."""
    model, rng = untrained(args), random.Random(args.seed)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [train_sft.Muon(matrices, 0)]  # has a test of its own
    optimizers += [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0)]
    validation = ["".join(x) for x in random_equations(random.Random(1_000_003), 1000, SEEN)]
    generator = torch.Generator().manual_seed(1_000_003)
    losses, log, looks = [], [], [round(i * args.steps / 10) for i in range(1, 11)]
    for step in range(1, args.steps + 1):
        batch = random_equations(rng, args.batch_size, SEEN)
        loss = -sum(logp(model, *example) for example in batch) / args.batch_size
        rate = train_sft.learning_rate(args.lr, step, args.steps, 0.4)  # has a test of its own
        update([rate, 3 * rate], loss, matrices + others, optimizers)
        losses.append(loss.item())
        if step in looks:
            log.append({"step": step, "equations": step * args.batch_size})
            log[-1]["loss"], losses = fmean(losses), []
            log[-1]["gap"] = -logps_of(model, validation).mean().item() - entropy_floor(validation)
            answers = answers_to(model, [*range(5, 21)] * 3, generator=generator)
            log[-1]["exact"] = fmean(map(is_exact, answers))
    return model.state_dict(), log


def pair_loss(args, z, chosen_logp):
    """Of one pair; z is the log-ratio of its chosen side minus that of the other."""
    if args.loss == "imitation":
        return -chosen_logp
    if args.loss == "ipo":
        return (z - 1 / (2 * args.beta)) ** 2
    right, wrong = ((1 + torch.exp(-sign * args.beta * z)).log() for sign in (1, -1))
    return (1 - args.label_smoothing) * right + args.label_smoothing * wrong


def dpo_by_hand(args):
    """The weights at the end, and the log."""
    torch.manual_seed(args.seed)
    policy, reference = untrained(args), untrained(args).requires_grad_(False)
    rng, from_file = random.Random(args.seed), args.pairs not in train_dpo.SOURCES
    source = train_dpo.SOURCES["offline" if from_file else args.pairs]
    B, terms, parameters = args.batch_size, args.preferred_terms, list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    looks = {1, 2, *(round(i * args.steps / 16) for i in range(17))}
    log = [{"step": 0, "own": train_dpo.look(policy, reference, terms, 0)}]
    for step in range(1, args.steps + 1):
        written = rng.choices(PAIRS, k=B) if from_file else random_pairs(rng, B, SEEN, terms)
        pairs = source(written, policy, reference, terms)
        losses, logged = [], []
        for prompt, chosen, rejected in pairs:
            logps = [logp(policy, prompt, side) for side in (chosen, rejected)]
            refs = [logp(reference, prompt, side) for side in (chosen, rejected)]
            rewards = [args.beta * (now - before) for now, before in zip(logps, refs)]
            margin = rewards[0] - rewards[1]
            loss = pair_loss(args, margin / args.beta, logps[0])
            losses.append(loss - args.nll_weight * logps[0])
            wins = (margin > 0) + 0.5 * (margin == 0)
            logged.append([x.item() for x in (loss, *rewards, margin, wins, *logps)])
        loss = sum(losses) / B
        if args.kl_weight:
            prompts = [prompt for prompt, _, _ in written[::2]]  # the term has a test of its own
            loss = loss + train_dpo.own_answers_loss(policy, reference, prompts, args.kl_weight)
        if losses or args.kl_weight:
            rate = train_sft.learning_rate(args.lr, step, args.steps, 0.7)
            update([rate], loss, parameters, [optimizer])
        log.append({"step": step, "pairs": len(pairs)})
        if pairs:
            log[-1] |= dict(zip(LOGGED, map(fmean, zip(*logged))))
            if step == 1:  # policy and reference agree: rounding decides which side is ahead
                del log[-1]["rewards/accuracies"]
        if step in looks:
            log[-1]["own"] = train_dpo.look(policy, reference, terms, step)
    return policy.state_dict(), log


def assert_logged(log, expected):
    """A log has these numbers, and no loss and no look where none is expected."""
    for record, numbers in zip(log, expected, strict=True):
        assert [x in record for x in ("loss", "own")] == [x in numbers for x in ("loss", "own")]
        record, numbers = (x | x.get("own", {}) for x in (record, numbers))
        for name in numbers.keys() - {"own"}:
            assert record[name] == pytest.approx(numbers[name], abs=SAME), name


def test_golden_learning_rates():
    """Of 100 steps five rise to 6, up to the 31st they stay there, and the others fall to 0."""
    rates = [train_sft.learning_rate(6.0, step, 100, 0.7) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([1.2, 2.4, 3.6, 4.8, 6])
    assert rates[4:31] == pytest.approx([6] * 27)
    assert rates[30:] == pytest.approx([6 * left / 70 for left in range(70, 0, -1)])
    assert train_sft.learning_rate(6.0, 1, 1, 0.4) == 6


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_muon_is_that_of_torch(shape):
    """But for the precision of bfloat16, two to three digits, in which torch makes its updates."""
    start, *gradients = torch.randn(5, 2, *shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = train_sft.Muon(ours, 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0)
    for gradient in gradients:
        for optimizer, matrices in zip(optimizers, (ours, theirs)):
            matrices[0].grad, matrices[1].grad = gradient[0].clone(), gradient[1] * 100
            optimizer.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - before).norm()


@pytest.mark.parametrize(
    "flags",
    [
        f"{SFT} --steps 3",
        f"{SFT} --steps 41 --batch-size 2",  # the rate rises for two steps
        f"{DPO} --pairs offline --label-smoothing 0.2 --nll-weight 0.7",
        f"{DPO} --pairs offline --loss imitation --preferred-terms 4",
        f"{DPO} --pairs pairs.jsonl --loss ipo --batch-size 4",
        f"{DPO} --pairs reference --kl-weight 0.6",
        f"{DPO} --pairs online --preferred-terms 2",
        f"{DPO} --pairs mistakes --nll-weight 0.7 --batch-size 3",
        f"{DPO} --pairs mistakes --batch-size 1 --lr 0.0005 --steps 41",
        f"{DPO} --pairs offline --kl-weight 0.6",
        f"{DPO} --pairs mistakes --batch-size 1 --lr 0.0005 --steps 41 --kl-weight 0.7",
    ],
)
def test_a_script_trains_as_the_loop_by_hand(tmp_path, flags):
    """The weights and the log. Of one prompt a step, some steps have nothing to learn from."""
    args, weights, log = train(flags, tmp_path / "out.pt")
    by_hand, expected = (dpo_by_hand if "sft" in args else sft_by_hand)(args)
    assert distance(weights, by_hand) < SAME
    assert distance(weights, untrained(args).state_dict()) > MOVED
    assert_logged(log, expected)
    if "--batch-size 1" in flags:
        learned = ["loss" in record for record in log if "pairs" in record]
        assert learned[0] and learned.count(False) > 3
