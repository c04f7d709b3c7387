"""The training loops against loops written out here, one sequence at a time.

All of it in double precision: two ways to the same sum then differ by some 1e-16, which neither
AdamW's division by tiny gradients nor Muon's by tiny singular values makes visible.
"""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
import torch.distributed.run
from torch.distributed import TCPStore

import train_dpo
import train_sft
from data import CUT_OFF, END, collate, compositions, encode, entropy_floor, is_exact
from data import random_equations, random_pairs, shuffled_forever
from model import GPT, GPTConfig, completion_logps, generate, load_checkpoint, save_checkpoint

ROOT = os.path.dirname(train_sft.__file__)
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
    """It holds a file of pairs, and a model to start from: a third of its answers is preferred."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # faster: the tensors are tiny
    folder = tmp_path_factory.mktemp("loops")
    lines = [json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))) for pair in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20))
    forms = (lambda n: f"1+2+{n - 3}", lambda n: f"{n - 4}+1+3", lambda n: f"1+{n - 1}")
    batch = collate([(f"{n}=", form(n)) for n in SEEN for form in forms])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(45):
        optimizer.zero_grad()
        (-completion_logps(model, *batch).mean()).backward()
        optimizer.step()
    save_checkpoint(str(folder / "start.pt"), model, {}, [])
    with contextlib.chdir(folder):
        yield
    torch.set_default_dtype(torch.float32)


def train(flags, out):
    """The args of a run, the weights it saves and its log."""
    script = train_dpo if "--sft" in flags else train_sft
    args = script.parse_args([*flags.split(), "--out", str(out)])
    script.main(args)
    return args, *results(out)


def results(out):
    log = map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())
    return torch.load(out)["model"], list(log)


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
    """log pi(y|x) of one sequence; a completion that was cut off has no end token."""
    ending = [] if completion.endswith(CUT_OFF) else [END]
    tokens = torch.tensor(encode(prompt + completion.removesuffix(CUT_OFF)) + ending)
    logps = model(tokens[None, :-1])[0].log_softmax(1)
    return logps.gather(1, tokens[1:, None])[len(prompt) - 1 :].sum()


def update(loss, parameters, optimizers, lr):
    """One step by gradients of this loss alone."""
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()


class MuonByHand(torch.optim.Optimizer):
    """The update of Muon from the singular values themselves, each mapped by the quintic."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            average = 0.95 * self.state[p].get("average", 0) + 0.05 * p.grad
            self.state[p]["average"] = average
            U, s, V = torch.linalg.svd(0.95 * average + 0.05 * p.grad, full_matrices=False)
            s = s / s.norm().clamp(min=1e-7)  # nothing yet moves what a zero matrix hides
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.sub_(self.param_groups[0]["lr"] * scale * (U * s) @ V)


def sft_by_hand(args):
    """The weights at the end, and the log; that of a long run lacks the metrics."""
    model, rng = untrained(args), np.random.default_rng(args.seed)
    sums, counts = shuffled_forever(rng, SEEN), shuffled_forever(rng, [2, 3, 4, 5])
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [MuonByHand(matrices, {"lr": 0})]
    optimizers += [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0)]
    validation = random_equations(np.random.default_rng(1_000_003), 1000, SEEN)
    generator = torch.Generator().manual_seed(1_000_003)
    losses, log, look_every = [], [], max(1, args.steps // train_sft.LOOKS)
    for step in range(1, args.steps + 1):
        drawn = [[next(items) for _ in range(args.batch_size)] for items in (sums, counts)]
        examples = zip(drawn[0], compositions(rng, *drawn))
        loss = -sum(logp(model, f"{n}=", completion) for n, completion in examples)
        losses.append(loss.item() / args.batch_size)
        rise, fall = step / max(1, round(0.03 * args.steps)), 1 - (step - 1) / args.steps
        lr = args.lr * min(rise, 1, fall / 0.7)
        update(loss / args.batch_size, matrices + others, optimizers, lr)
        if step % look_every == 0:
            loss = np.mean(losses[-look_every:])  # since the last record
            log.append({"step": step, "equations": step * args.batch_size, "loss": loss})
        if args.steps < train_sft.LOOKS:
            nats = -completion_logps(model, *collate(validation)).mean().item()
            log[-1]["gap"] = nats - entropy_floor(map("".join, validation))
            prompts = [f"{n}=" for n in range(5, 21)] * 3
            answers = zip(prompts, generate(model, prompts, generator=generator))
            log[-1]["exact"] = np.mean([is_exact("".join(answer)) for answer in answers])
    return model.state_dict(), log


def pair_loss(args, z, chosen_logp):
    """Of one pair; z is the log-ratio of its chosen side less that of the other."""
    if args.loss == "sft":
        return -chosen_logp
    if args.loss == "ipo":
        return (z - 1 / (2 * args.beta)) ** 2
    right, wrong = (1 / (1 + torch.exp(-sign * args.beta * z)) for sign in (1, -1))
    return -(1 - args.label_smoothing) * right.log() - args.label_smoothing * wrong.log()


def dpo_by_hand(args, world=1):
    """The averaged weights at the end, and the log, of a run of `world` processes."""
    states = []  # of the random numbers of every process, once it has loaded both models
    for rank in range(world):
        torch.manual_seed(args.seed * world + rank)
        policy, reference = untrained(args), untrained(args).requires_grad_(False)
        states.append(torch.get_rng_state())
    average, rng = untrained(args), np.random.default_rng(args.seed)
    source = train_dpo.SOURCES.get(args.pairs, train_dpo.offline_pairs)
    file = None if args.pairs in train_dpo.SOURCES else shuffled_forever(rng, PAIRS)
    B, terms, parameters = args.batch_size, args.preferred_terms, list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    looks = {1, 2, *range(0, args.steps + 1, args.steps // train_dpo.EVEN_LOOKS or 1)}
    log, pairs_seen = [], 0
    for step in range(args.steps + 1):
        if step in looks:
            log.append({"step": step, "own": train_dpo.look(average, reference, terms)[0]})
        if step == args.steps:
            return average.state_dict(), log
        written = [next(file) for _ in range(B)] if file else random_pairs(rng, B, SEEN, terms)
        pairs, unpaired = [], []
        for rank in range(world):
            torch.set_rng_state(states[rank])
            part = source(written[rank::world], policy, reference, terms)
            states[rank] = torch.get_rng_state()
            pairs, unpaired = pairs + part[0], unpaired + part[1]
        losses = [-logp(policy, *example) * args.nll_weight for example in unpaired]
        losses, logged = losses if args.nll_weight else [], []
        for prompt, chosen, rejected in pairs:
            logps = [logp(policy, prompt, side) for side in (chosen, rejected)]
            refs = [logp(reference, prompt, side) for side in (chosen, rejected)]
            rewards = [args.beta * (now - before) for now, before in zip(logps, refs)]
            margin = rewards[0] - rewards[1]
            loss = pair_loss(args, margin / args.beta, logps[0])
            losses.append(loss - args.nll_weight * logps[0])
            logged.append([x.item() for x in (loss, *rewards, margin, margin > 0, *logps)])
        if losses:
            rise, fall = (step + 1) / max(1, round(0.05 * args.steps)), 1 - step / args.steps
            lr = args.lr * min(rise, 1, fall / 0.7)
            update(sum(losses) / B, parameters, [optimizer], lr)
        cubes = [(n + 1) * (n + 2) * (n + 3) for n in range(step + 1)]  # n^3, but for its start
        for kept, new in zip(average.parameters(), parameters):
            kept.data += (new.data - kept.data) * cubes[-1] / sum(cubes)
        pairs_seen += len(pairs)
        log.append({"step": step + 1, "pairs": pairs_seen})
        if pairs:
            log[-1] |= dict(zip(LOGGED, np.mean(logged, axis=0).tolist()))
            if step == 0:  # policy and reference agree: rounding decides which side is ahead
                del log[-1]["rewards/accuracies"]


def assert_logged(log, expected):
    """A log has these numbers, and no loss where none is expected."""
    for record, numbers in zip(log, expected, strict=True):
        record, numbers = (x | x.get("own", {}) for x in (record, numbers))
        assert ("loss" in record) == ("loss" in numbers)
        for name in numbers.keys() - {"own", "seconds"}:
            assert record[name] == pytest.approx(numbers[name], abs=SAME), name


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_muon_is_that_of_torch(shape):
    """But for the precision of bfloat16, two to three digits, in which torch makes its updates."""
    start, *gradients = torch.randn(5, 2, *shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = train_sft.Muon([ours], 0.1), torch.optim.Muon(theirs, 0.1, weight_decay=0)
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
        f"{SFT} --steps {2 * train_sft.LOOKS} --batch-size 2",  # the rate rises for two steps
        f"{DPO} --pairs offline --label-smoothing 0.2 --nll-weight 0.7",
        f"{DPO} --pairs offline --loss sft --preferred-terms 4",
        f"{DPO} --pairs pairs.jsonl --loss ipo --batch-size 4",
        f"{DPO} --pairs reference",
        f"{DPO} --pairs online --preferred-terms 2",
        f"{DPO} --pairs mistakes --nll-weight 0.7 --batch-size 3",
        f"{DPO} --pairs mistakes --batch-size 1 --lr 0.0005 --steps {2 * train_dpo.EVEN_LOOKS}",
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


CHANGES = "seed=6 lr=0.001 steps=3 batch-size=7 beta=0.4 loss=ipo loss=sft label-smoothing=0.1 "
CHANGES += "nll-weight=0.1 preferred-terms=4 pairs=reference pairs=online pairs=mistakes"


@pytest.mark.parametrize(
    "flags, changes",
    [
        (SFT, "seed=6 lr=0.01 steps=3 batch-size=7 heads=4"),
        (f"{DPO} --pairs offline", CHANGES),
        (f"{DPO} --pairs mistakes", "seed=6 preferred-terms=2 nll-weight=0.1"),
    ],
)
def test_every_flag_matters(tmp_path, flags, changes):
    """Two steps with another value end elsewhere; with the same flags they end in the same."""

    changes = ["", "", *(f"--{change}" for change in changes.split())]
    one, same, *others = (train(f"{flags} --steps 2 {x}", tmp_path / "out.pt")[1] for x in changes)
    assert distance(one, same) == 0
    for change, other in zip(changes[2:], others):
        assert distance(one, other) > 1e-5, change


# Commands run one after the other in processes started once, which meet at a store for each.
COMMANDS = """
import atexit, json, os, runpy, sys
import torch
torch.set_default_dtype(torch.float64)
for port, *sys.argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.destroy_process_group()
    atexit.unregister(torch.distributed.destroy_process_group)
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """With parts of unequal size, some of them empty, and with answers that each draws anew."""
    runs = [
        f"{SFT} --steps 3 --batch-size 7",
        f"{SFT} --steps 3 --batch-size 1",
        f"{DPO} --pairs offline --batch-size 7",
        f"{DPO} --pairs pairs.jsonl --batch-size 1",
        f"{DPO} --pairs mistakes --batch-size 7 --nll-weight 0.7",
    ]
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in runs]
    outs, commands = [tmp_path / "two" / f"{i}.pt" for i in range(len(runs))], []
    for store, flags, out in zip(stores, runs, outs):
        script = f"{ROOT}/train_{'dpo' if '--sft' in flags else 'sft'}.py"
        commands.append([store.port, script, *flags.split(), "--out", str(out)])
    (tmp_path / "driver.py").write_text(COMMANDS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", ROOT)
    driver = [str(tmp_path / "driver.py"), json.dumps(commands)]
    torch.distributed.run.main(["--standalone", "--nproc-per-node", "2", *driver])
    assert len(list((tmp_path / "two").iterdir())) == 2 * len(runs)
    for flags, out in zip(runs, outs):
        weights, log = results(out)
        args, alone, expected = train(flags, tmp_path / "alone.pt")
        if "mistakes" in flags:
            alone, expected = dpo_by_hand(args, world=2)
        assert distance(weights, alone) < SAME
        assert_logged(log, expected)
