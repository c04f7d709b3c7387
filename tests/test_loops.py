"""The training loops against loops written out here, one sequence at a time.

All of it in double precision: two ways to the same sum then differ by some 1e-16, which neither
AdamW's division by tiny gradients nor Muon's by tiny singular values makes visible.
"""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

import train_dpo
import train_sft
from data import END, PAD, InputError, collate, encode, random_equations
from model import GPT, GPTConfig, completion_logps, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
SFT = "--depth 2 --width 16 --heads 2 --max-sum 20 --batch-size 8 --seed 5"
DPO = "--sft START --steps 4 --batch-size 8 --beta 0.3 --seed 5"
SEEN = [5, 8, 11, 14, 17, 20]  # 6, 7, 9, 10, 12, 13, 15, 16, 18 and 19 are held out
SAME, MOVED = 1e-9, 1e-3  # differences of weights: at most by rounding, and as training does

LOGGED = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
LOGGED += ["logps/chosen", "logps/rejected"]  # of every pair, in this order in dpo_by_hand

PAIRS = [
    {"prompt": "9=", "chosen": "3+3+3", "rejected": "4+5"},
    {"prompt": "17=", "chosen": "5+5+7", "rejected": "17"},
    {"prompt": "20=", "chosen": "1+1+18", "rejected": "4+4+4+4+4"},
    {"prompt": "100=", "chosen": "", "rejected": "++"},
    {"prompt": "6=", "chosen": "2+2+2", "rejected": "1+1+1+1+2"},
]


@pytest.fixture(autouse=True, scope="module")
def double():
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # faster: the tensors are tiny
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(double, tmp_path_factory):
    """Two files of pairs, and a model to start from: one in six of its answers is preferred."""
    folder = tmp_path_factory.mktemp("loops")
    lines = [json.dumps(pair) + "\n" for pair in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(lines))
    (folder / "pair.jsonl").write_text(lines[0])
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20))
    forms = (lambda n: f"1+2+{n - 3}", lambda n: f"{n - 4}+1+3", lambda n: f"1+{n - 1}", str)
    batch = collate([(f"{n}=", form(n)) for n in SEEN for form in forms])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        (-completion_logps(model, *batch).mean()).backward()
        optimizer.step()
    with open(folder / "start.pt", "wb") as file:
        save_checkpoint(file, model, {})
    return folder


def in_folder(folder, flags, out):
    names = {"START": "start.pt", "PAIRS": "pairs.jsonl", "PAIR": "pair.jsonl"}
    words = [str(folder / names[word]) if word in names else word for word in flags.split()]
    return [*words, "--out", str(out)]


def train(script, folder, flags, out):
    """The args of a run, the weights it saves and its log."""
    args = script.parse_args(in_folder(folder, flags, out))
    script.main(args)
    return args, *results(out)


def results(out):
    log = out.with_suffix(".jsonl").read_text().splitlines()
    return torch.load(out)["model"], [json.loads(line) for line in log]


def distance(one, other):
    assert one.keys() == other.keys()
    return torch.stack([(one[name] - other[name]).abs().max() for name in one]).max()


def logp(model, tokens, completion):
    """log pi(y|x) of one sequence: tokens (T,), and the columns of the completion."""
    logits = model(tokens[None, : completion[-1]])[0]
    return logits.log_softmax(1)[completion - 1, tokens[completion]].sum()


def update(loss, parameters, optimizers, args, done, warmup):
    """One step by gradients of this loss alone, at the rate of a linear rise, then fall."""
    rise = max(1, round(warmup * args.steps))
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = args.lr * min((done + 1) / rise, 1 - done / args.steps)
        optimizer.step()


def untrained(args):
    """The model a run starts from."""
    if "sft" in args:
        return load_checkpoint(args.sft)[0]
    torch.manual_seed(args.seed)
    return GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum))


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
    """The weights at the end, and the loss of every step."""
    model = untrained(args)
    rng = np.random.default_rng(args.seed)
    parameters = dict(model.named_parameters())
    matrices = [name for name, p in parameters.items() if name[:6] == "blocks" and p.ndim == 2]
    assert len(matrices) == 4 * args.depth
    others = [parameters[name] for name in parameters.keys() - set(matrices)]
    optimizers = [
        MuonByHand([parameters[name] for name in matrices], {"lr": 0}),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0),
    ]
    losses = []
    for done in range(args.steps):
        loss = 0
        for prompt, completion in random_equations(rng, args.batch_size, SEEN):
            tokens = [PAD] * (5 - len(prompt)) + encode(prompt + completion) + [END]
            loss -= logp(model, torch.tensor(tokens), torch.arange(5, len(tokens)))
        loss = loss / args.batch_size
        update(loss, list(parameters.values()), optimizers, args, done, warmup=0.03)
        losses.append(loss.item())
    return model.state_dict(), losses


def pair_loss(args, z, chosen_logp):
    """Of one pair; z is the log-ratio of its chosen side less that of the other."""
    if args.loss == "sft":
        return -chosen_logp
    if args.loss == "ipo":
        return (z - 1 / (2 * args.beta)) ** 2
    right, wrong = (1 / (1 + torch.exp(-sign * args.beta * z)) for sign in (1, -1))
    return -(1 - args.label_smoothing) * right.log() - args.label_smoothing * wrong.log()


def dpo_by_hand(args, world=1):
    """The averaged weights at the end, and what the log says of every step.

    The batches are those of train_dpo.py, of each of `world` processes, for the policy kept here.
    """
    policy = untrained(args)
    reference, average = copy.deepcopy(policy).requires_grad_(False), None
    sources = [train_dpo.pair_batches(args, policy, reference, r, world) for r in range(world)]
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    comparisons = args.answers * (args.answers - 1) // 2
    records, pairs = [{"step": 0, "pairs": 0}], 0
    for done in range(args.steps):
        loss = 0 * sum(p.sum() for p in parameters)  # there may be no pair
        logged = {name: [] for name in LOGGED}
        for rank, batch in enumerate(map(next, sources)):
            rows = [(row, mask.nonzero()[:, 0]) for row, mask in zip(*batch[:2])]
            logps = [logp(policy, *row) for row in rows]
            ratios = [now - logp(reference, *row) for now, row in zip(logps, rows)]
            chosen, rejected = batch.chosen.tolist(), batch.rejected.tolist()
            for c, r in zip(chosen, rejected):
                one_loss = pair_loss(args, ratios[c] - ratios[r], logps[c])
                loss = loss + one_loss
                rewards = args.beta * ratios[c], args.beta * ratios[r]
                margin = rewards[0] - rewards[1]
                numbers = [one_loss, *rewards, margin, margin > 0, logps[c], logps[r]]
                for name, number in zip(LOGGED, numbers):
                    logged[name].append(number.item())
            # Online it is every written answer, and these come first; otherwise each chosen one.
            online = args.pairs == "online"
            anchor = range(len(range(rank, args.batch_size, world))) if online else chosen
            loss = loss - args.nll_weight * sum(logps[i] for i in anchor if args.nll_weight)
        loss = loss / (args.batch_size * comparisons)
        update(loss, parameters, [optimizer], args, done, warmup=0.05)
        new = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        average = average or new  # the first update counts in full
        average = {k: kept + (new[k] - kept) / (1 + done / 4) for k, kept in average.items()}
        if args.pairs == "on-policy":
            del logged["rewards/accuracies"]  # of two equal answers either may win, by rounding
        pairs += len(logged["loss"])
        means = {name: np.mean(numbers) for name, numbers in logged.items() if numbers}
        records.append({"step": done + 1, "pairs": pairs} | means)
    return average, records


def assert_logged(log, expected):
    """A log has these numbers, and no loss where none is expected."""
    assert len(log) == len(expected)
    for record, numbers in zip(log, expected):
        assert ("loss" in record) == ("loss" in numbers)
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, abs=SAME)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_muon_is_that_of_torch(shape):
    """But for the precision of bfloat16, two to three digits, in which torch makes its updates."""
    rng, moved = torch.Generator().manual_seed(0), []
    start, gradients = (torch.randn(n, *shape, generator=rng) for n in (1, 4))
    for muon in (train_sft.Muon, functools.partial(torch.optim.Muon, weight_decay=0)):
        matrix = torch.nn.Parameter(start[0].clone())
        optimizer = muon([matrix], lr=0.1)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        moved.append((matrix - start[0]).detach())
    ours, theirs = moved
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    "flags, logged_steps",
    [("--steps 3", 1), ("--steps 70 --batch-size 2", 2)],  # the rate rises for one step, or two
)
def test_sft_trains_as_the_loop_by_hand(folder, tmp_path, flags, logged_steps):
    """On the seen sums alone; the loss in the log is the mean since the last record."""
    args, weights, log = train(train_sft, folder, f"{SFT} {flags}", tmp_path / "sft.pt")
    by_hand, losses = sft_by_hand(args)
    assert distance(weights, by_hand) < SAME
    assert distance(weights, untrained(args).state_dict()) > MOVED
    assert log[-1]["step"] == args.steps
    assert log[-1]["equations"] == args.steps * args.batch_size
    assert log[-1]["loss"] == pytest.approx(np.mean(losses[-logged_steps:]), abs=SAME)


@pytest.mark.parametrize(
    "flags",
    [
        "--pairs offline",
        "--pairs offline --steps 40 --batch-size 2",  # the learning rate rises for two steps
        "--pairs offline --label-smoothing 0.2",
        "--pairs offline --loss ipo",
        "--pairs offline --loss sft --preferred-terms 4",
        "--pairs offline --nll-weight 0.7",
        "--pairs PAIRS --batch-size 4",
        "--pairs reference",
        "--pairs on-policy --answers 3 --judge-reward 1",
        "--pairs on-policy --answers 3 --judge-reward 1 --nll-weight 0.7",
        "--pairs online",
        "--pairs online --nll-weight 0.7",
    ],
)
def test_dpo_trains_as_the_loop_by_hand(folder, tmp_path, flags):
    """Whatever the source of the pairs and the loss: the weights kept, and all of the log."""
    args, weights, log = train(train_dpo, folder, f"{DPO} {flags}", tmp_path / "dpo.pt")
    by_hand, records = dpo_by_hand(args)
    assert distance(weights, by_hand) < SAME
    assert distance(weights, untrained(args).state_dict()) > MOVED
    assert_logged(log, records)


@pytest.mark.parametrize(
    "script, flags, changes",
    [
        (train_sft, SFT, "seed=6 lr=0.01 steps=3 batch-size=7"),
        (
            train_dpo,
            f"{DPO} --pairs offline",
            "seed=6 lr=0.001 steps=3 batch-size=7 beta=0.4 loss=ipo loss=sft label-smoothing=0.1 "
            "nll-weight=0.1 preferred-terms=4",
        ),
        (train_dpo, f"{DPO} --pairs PAIRS", "seed=6"),
        (
            train_dpo,
            f"{DPO} --pairs reference",
            "seed=6 preferred-terms=2 answers=3 pairs=on-policy pairs=online pairs=offline",
        ),
        (
            train_dpo,
            f"{DPO} --pairs on-policy --judge-reward 5",
            "seed=6 preferred-terms=2 answers=3 judge-reward=1",
        ),
        (train_dpo, f"{DPO} --pairs online", "seed=6 preferred-terms=2 nll-weight=0.1"),
    ],
)
def test_every_flag_matters(folder, tmp_path, script, flags, changes):
    """Two steps with another value end elsewhere; with the same flags they end in the same."""

    def weights(change=""):
        return train(script, folder, f"{flags} --steps 2 {change}", tmp_path / "out.pt")[1]

    before = weights()
    assert distance(weights(), before) == 0
    for change in changes.split():
        assert distance(weights(f"--{change}"), before) > 1e-5, change


# Runs commands one after the other in processes that torchrun started once. They find each other
# through a store, one for every command.
COMMANDS = """
import json, os, runpy, sys
import torch
torch.set_default_dtype(torch.float64)
for port, *sys.argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.destroy_process_group()
"""


def comparable(record):
    """A record without the time and the policy's own answers, which each process draws anew."""
    return {name: x for name, x in record.items() if name != "seconds" and name[:3] != "own"}


def test_two_processes_train_as_one(folder, tmp_path):
    """With parts of unequal size, one of them empty, and with answers that each draws anew."""
    runs = {
        "sft": (train_sft, f"{SFT} --steps 4 --batch-size 7"),
        "offline": (train_dpo, f"{DPO} --pairs offline --batch-size 7"),
        "pair": (train_dpo, f"{DPO} --pairs PAIR --batch-size 1"),
        "online": (train_dpo, f"{DPO} --pairs online --batch-size 7 --nll-weight 0.7"),
    }
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in runs]
    commands = []
    for store, (name, (script, flags)) in zip(stores, runs.items()):
        flags = in_folder(folder, flags, tmp_path / "two" / f"{name}.pt")
        commands.append([store.port, script.__file__, *flags])
    driver = tmp_path / "driver.py"
    driver.write_text(COMMANDS)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    subprocess.run(
        [sys.executable, *launcher, driver, json.dumps(commands)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=300,
    )
    names = {f"{name}.{ending}" for name in runs for ending in ("pt", "jsonl")}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names

    for name, (script, flags) in runs.items():
        weights, log = results(tmp_path / "two" / f"{name}.pt")
        args, alone, expected = train(script, folder, flags, tmp_path / f"{name}.pt")
        if name == "online":
            alone, expected = dpo_by_hand(args, world=2)
        assert distance(weights, alone) < SAME
        assert distance(weights, untrained(args).state_dict()) > MOVED
        assert_logged(log, [comparable(record) for record in expected])
        shares = [record["own/parsed"] for record in log if "own/parsed" in record]
        assert all(0.7 < share <= 1 for share in shares)  # of all answers of both


@pytest.mark.parametrize(
    "script, flags, complaint",
    [
        (train_sft, f"{SFT} --steps 5", "the model is not finite at step 2"),
        (train_dpo, f"{DPO} --pairs offline --steps 40", "the loss is not finite at step 2"),
        (train_dpo, f"{DPO} --pairs offline --steps 4", "the policy is not finite at step 1"),
    ],
)
def test_run_that_is_not_finite_leaves_the_files_as_they_were(
    folder, tmp_path, script, flags, complaint
):
    """A checkpoint and a log of an earlier run stay, and no temporary file does."""
    earlier = {tmp_path / "out.pt": b"a checkpoint", tmp_path / "out.jsonl": b"a log"}
    for path, content in earlier.items():
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        train(script, folder, f"{flags} --lr 1e300", tmp_path / "out.pt")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == earlier
