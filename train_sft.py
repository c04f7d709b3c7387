"""Stage 1, supervised fine-tuning: a small Transformer learns to write right equations.

    python train_sft.py                # writes runs/sft.pt and its log, runs/sft.jsonl

Next-token cross-entropy on the completions, on equations drawn fresh for every step. Left out on
purpose: epochs, data files, resuming (a run takes minutes). train_dpo.py has the same headings in
the same order: a diff of the two files shows what DPO changes.
"""

import json
import math
import time

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import (
    DEFAULT_MAX_SUM,
    MAX_SUM_RANGE,
    ArgumentParser,
    InputError,
    collate,
    diverged,
    entropy_floor,
    integer_in,
    nats_per_equation,
    positive_number,
    random_equations,
    run_script,
    seen_sums,
)
from model import (
    GPT,
    GPTConfig,
    Muon,
    completion_logps,
    data_parallel,
    find_device,
    join_processes,
    open_log,
    save_checkpoint,
)

LOGGED = 30  # times a run
VALIDATION_SEED = 1_000_003  # its own: the same equations whatever the seed of the run
VALIDATION_SIZE = 1000


def parse_args(argv=None):
    parser = ArgumentParser(description="Train a small Transformer on random equations.")
    add = parser.add_argument
    # the model, written into the checkpoint
    add("--depth", type=integer_in(1, 100), default=6, help="blocks (%(default)s)")
    add(
        "--width", type=integer_in(1, 4096), default=48, help="of the residual stream (%(default)s)"
    )
    add("--heads", type=integer_in(1, 4096), default=4, help="of attention (%(default)s)")
    add(
        "--max-sum",
        type=integer_in(*MAX_SUM_RANGE),
        default=DEFAULT_MAX_SUM,
        help="largest sum (%(default)s)",
    )
    # the run
    add("--steps", type=integer_in(1, 10**9), default=3000, help="updates (%(default)s)")
    add(
        "--batch-size",
        type=integer_in(1, 10**6),
        default=256,
        help="equations a step (%(default)s)",
    )
    add(
        "--lr",
        type=positive_number,
        default=1.2e-2,
        help="highest learning rate; a batch of 64 wants half of it (%(default)s)",
    )
    add(
        "--seed",
        type=integer_in(0, 2**32),
        default=0,
        help="of weights and equations (%(default)s)",
    )
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    add("--out", default="runs/sft.pt", help="checkpoint to write (%(default)s)")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        raise InputError(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


def main(args):
    # ---- setup
    rank, world = join_processes(args)
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, rank])

    # ---- model
    model = GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum)).to(device)
    parallel_model = data_parallel(model, world)

    # ---- data: fresh equations for every step, and a fixed set for validation
    sums = np.array(seen_sums(args.max_sum))
    floor = entropy_floor(sums.tolist())
    validation = random_equations(np.random.default_rng(VALIDATION_SEED), VALIDATION_SIZE, sums)
    validation_floor = nats_per_equation(validation)
    validation_batch = [x.to(device) for x in collate(validation)]

    # ---- optimizer: Muon for the matrices inside the blocks, AdamW for all else
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [
        Muon(matrices, args.lr),
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True),
    ]
    rise = max(1, round(0.03 * args.steps))
    schedules = [
        LambdaLR(optimizer, lambda done: min((done + 1) / rise, 1 - done / args.steps))
        for optimizer in optimizers
    ]

    # ---- the loop
    log_every = max(1, args.steps // LOGGED)
    losses, seconds = [], 0.0
    with (
        open_log(args.out, rank) as log,
        tqdm(total=args.steps, desc="SFT", disable=rank > 0) as bar,
    ):
        for step in range(1, args.steps + 1):
            # ---- batch
            started = time.perf_counter()
            examples = random_equations(rng, args.batch_size // world, sums)
            tokens, completion_mask = (x.to(device) for x in collate(examples))

            # ---- loss: nats per equation
            loss = -completion_logps(parallel_model, tokens, completion_mask).mean()

            # ---- update
            if not loss.isfinite():
                raise diverged(step, losses, args.out)
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

            # ---- log
            losses.append(loss.item())
            seconds += time.perf_counter() - started  # of training: measurements are not counted
            bar.update()
            if rank == 0 and (step % log_every == 0 or step == args.steps):
                with torch.no_grad():
                    validation_loss = -completion_logps(model, *validation_batch).mean().item()
                if not math.isfinite(validation_loss):
                    raise diverged(step, losses, args.out)
                record = {
                    "step": step,
                    "equations": step * args.batch_size,
                    "seconds": seconds,
                    "loss": float(np.mean(losses[-log_every:])),
                    "floor": floor,
                    "gap": validation_loss - validation_floor,
                }
                print(json.dumps(record), file=log, flush=True)
                bar.set_postfix(loss=f"{record['loss']:.3f}", gap=f"{record['gap']:.3f}")

    # ---- save
    if rank == 0:
        save_checkpoint(args.out, model, vars(args))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
