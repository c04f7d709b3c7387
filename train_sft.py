"""Stage 1, supervised fine-tuning: a small Transformer learns to write right equations.

    python train_sft.py                # writes runs/sft.pt and its log, runs/sft.jsonl

Next-token cross-entropy on the completions, on equations drawn fresh for every step. Left out on
purpose: epochs, data files, resuming (a run takes minutes). train_dpo.py has the same headings in
the same order: a diff of the two files shows what DPO changes.
"""

import math
import time

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from data import DEFAULT_MAX_SUM, MIN_SUM, InputError, collate, decode, entropy_floor, is_exact
from data import make_parser, max_sum, nats_per_equation, positive_int, random_equations, replacing
from data import run_script, seen_sums, training_flags
from model import GPT, GPTConfig, add_up, completion_logps, find_device, generate, join_processes
from model import log_path, save_checkpoint, write_record

LOGGED = 30  # times a run
VALIDATION_SEED = 1_000_003  # its own: the same equations whatever the seed of the run
VALIDATION_SIZE = 1000


def parse_args(argv=None):
    parser = make_parser("Train a small Transformer on random equations.", [training_flags()])
    parser.set_defaults(steps=4800, batch_size=256, lr=1.2e-2, out="runs/sft.pt")
    add = parser.add_argument
    add("--depth", type=positive_int, default=6, help="blocks")
    add("--width", type=positive_int, default=48, help="of the residual stream")
    add("--heads", type=positive_int, default=4, help="of attention")
    add("--max-sum", type=max_sum, default=DEFAULT_MAX_SUM, help="largest sum, 20 to 999")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves equally far.

    torch.optim.Muon (Jordan et al., 2024) does the same in bfloat16. A processor that must emulate
    it spends a third of a training step on that; so here it is in the precision of the weights.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for matrix in group["params"]:
            average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
            average.lerp_(matrix.grad, 1 - group["momentum"])
            update = orthogonalise(matrix.grad.lerp(average, group["momentum"]))  # as Nesterov's
            rows, columns = matrix.shape
            matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(x):
    """A matrix of the same singular vectors, its singular values pushed near 1.

    Newton-Schulz: five rounds of a s + b s^3 + c s^5 take any singular value s from 0.003 to 1 to
    between 0.68 and 1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # those of torch.optim.Muon
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.mT).mT
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        xx = x @ x.mT
        # a x + (b xx + c xx xx) x, a product and the sum around it in one call
        x = torch.addmm(x, torch.addmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    return x


def main(args):
    # ---- setup
    device = find_device(args.device)
    rank, world = join_processes(device)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    # ---- model
    model = GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum)).to(device)

    # ---- data: fresh equations for every step, and a fixed set and all prompts for validation
    sums = seen_sums(args.max_sum)
    floor = entropy_floor(sums)
    validation = random_equations(np.random.default_rng(VALIDATION_SEED), VALIDATION_SIZE, sums)
    validation_floor = nats_per_equation(validation)
    validation_batch = [x.to(device) for x in collate(validation)]
    prompts = [f"{n}=" for n in range(MIN_SUM, args.max_sum + 1)] * 3
    generator = torch.Generator(device).manual_seed(VALIDATION_SEED)

    # ---- optimizer: Muon for the blocks' matrices, AdamW for all else
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "blocks" not in name]
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
        replacing(args.out, log_path(args.out), keep=rank == 0) as (checkpoint_file, log),
        tqdm(total=args.steps, desc="SFT", disable=rank > 0) as bar,
    ):
        for step in range(1, args.steps + 1):
            # ---- batch: one draw for all processes, of which each takes its part
            started = time.perf_counter()
            examples = random_equations(rng, args.batch_size, sums)[rank::world]
            tokens, completion_mask = (x.to(device) for x in collate(examples))

            # ---- loss: nats per equation
            loss = -completion_logps(model, tokens, completion_mask).sum() / args.batch_size

            # ---- update
            loss.backward()
            loss = loss.detach()
            add_up([loss, *(p.grad for p in model.parameters())])
            if not loss.isfinite():
                raise InputError(f"the loss is not finite at step {step}: try a lower --lr")
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

            # ---- log
            losses.append(loss.item())
            seconds += time.perf_counter() - started  # of training: measurements are not counted
            bar.update()
            if step % log_every == 0 or step == args.steps:
                with torch.no_grad():
                    validation_loss = -completion_logps(model, *validation_batch).mean().item()
                if not math.isfinite(validation_loss):
                    raise InputError(f"the model is not finite at step {step}: try a lower --lr")
                answers, _ = generate(model, prompts, generator=generator)
                record = {
                    "step": step,
                    "equations": step * args.batch_size,
                    "seconds": seconds,
                    "loss": float(np.mean(losses[-log_every:])),
                    "floor": floor,
                    "gap": validation_loss - validation_floor,
                    "exact": float(np.mean([is_exact(decode(row)) for row in answers.tolist()])),
                }
                write_record(log, record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", gap=f"{record['gap']:.3f}")

        # ---- save
        save_checkpoint(checkpoint_file, model, vars(args))
    if rank == 0:
        print(f"The model is in {args.out}, its log in {log_path(args.out)}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
