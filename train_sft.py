"""Stage 1, supervised fine-tuning: a small Transformer learns to write right equations.

    python train_sft.py                # writes runs/sft.pt and its log, runs/sft.jsonl

The loss is next-token cross-entropy on the completions of equations that are drawn fresh for every
step. We left out epochs, data files and resuming: a run takes minutes. train_dpo.py has the same
headings in the same order, so a diff of the two files shows what DPO changes.
"""

import time

import numpy as np
import torch
from tqdm import tqdm

from data import DEFAULT_MAX_SUM, DEVICES, MIN_SUM, TERM_COUNTS, InputError, add_up, check_writable
from data import collate, compositions, entropy_floor, join_processes, log_path, make_parser
from data import measure, number, random_equations, run_script, seen_sums, shuffled_forever
from model import GPT, GPTConfig, completion_logps, generate, save_checkpoint

LOOKS = 30  # measurements a run
VALIDATION_SEED = 1_000_003  # the same equations whatever the seed of the run


def parse_args(argv=None):
    parser = make_parser("Train a small Transformer on random equations.")
    add = parser.add_argument
    add("--steps", type=number(int, 1), default=4500, help="updates of the weights")
    add("--batch-size", type=number(int, 1), default=128, help="equations a step")
    add("--lr", type=number(float, 1e-9), default=6e-3, help="highest learning rate")
    add("--depth", type=number(int, 1), default=6, help="blocks")
    add("--width", type=number(int, 1), default=48, help="width of the residual stream")
    add("--heads", type=number(int, 1), default=4, help="attention heads")
    add("--max-sum", type=number(int, 20, 999), default=DEFAULT_MAX_SUM, help="largest sum")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    add("--out", default="runs/sft.pt", help="checkpoint; the log is beside it, as .jsonl")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves equally far.

    torch.optim.Muon (Jordan et al., 2024) does the same in bfloat16, which many CPUs emulate; this
    version stays in float32. It takes groups of matrices of one shape, and moves a group at once.
    """

    def __init__(self, groups, lr, momentum=0.95):
        super().__init__([{"params": group} for group in groups], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            grads = torch.stack([p.grad for p in group["params"]])  # (matrices, rows, columns)
            average = self.state[group["params"][0]].setdefault("average", torch.zeros_like(grads))
            average.lerp_(grads, 1 - group["momentum"])
            updates = orthogonalise(grads.lerp(average, group["momentum"]))  # as Nesterov's
            rows, columns = grads.shape[1:]
            for p, update in zip(group["params"], updates):
                p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(x):
    """Matrices (..., rows, columns) with the same singular vectors and singular values near 1.

    Newton-Schulz: five rounds of a s + b s^3 + c s^5 take any singular value s from 0.003 to 1 to
    between 0.68 and 1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # those of torch.optim.Muon
    if x.shape[-2] > x.shape[-1]:
        return orthogonalise(x.mT).mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x


def make_optimizers(model, lr):
    """Muon for the matrices of the blocks, grouped by shape, and AdamW for all other weights."""
    by_layer = zip(*(block.parameters() for block in model.blocks))
    matrices = [layer for layer in by_layer if layer[0].ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "blocks" not in name]
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return Muon(matrices, lr), adamw


def main(args):
    # ---- setup
    rank, world = join_processes()
    if rank == 0:
        check_writable(args.out, log_path(args.out))
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    # ---- model
    model = GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum)).to(args.device)

    # ---- data: every sum and every number of terms in turn, and a fixed set for validation
    sums = seen_sums(args.max_sum)
    next_sums, next_counts = shuffled_forever(rng, sums), shuffled_forever(rng, TERM_COUNTS)
    validation = random_equations(np.random.default_rng(VALIDATION_SEED), 1000, sums)
    validation_batch = [x.to(args.device) for x in collate(validation)]
    prompts = [f"{n}=" for n in range(MIN_SUM, args.max_sum + 1)] * 3
    generator = torch.Generator(args.device).manual_seed(VALIDATION_SEED)

    # ---- optimizers: Muon and AdamW
    optimizers = make_optimizers(model, args.lr)
    warmup = max(1, round(0.03 * args.steps))

    # ---- the loop
    log, losses, seconds = [], [], 0.0
    look_every = max(1, args.steps // LOOKS)
    for step in tqdm(range(1, args.steps + 1), desc="SFT", disable=rank > 0):
        # ---- learning rate: it rises, stays, and falls to zero over the last 70 %
        started = time.perf_counter()
        lr = args.lr * min(step / warmup, 1, (1 - (step - 1) / args.steps) / 0.7)

        # ---- batch: one draw for all processes, of which each takes its part
        batch_sums = [next(next_sums) for _ in range(args.batch_size)]
        batch_counts = [next(next_counts) for _ in range(args.batch_size)]
        completions = compositions(rng, batch_sums, batch_counts)
        examples = [(f"{n}=", completion) for n, completion in zip(batch_sums, completions)]
        tokens, completion_mask = (x.to(args.device) for x in collate(examples[rank::world]))

        # ---- loss: nats per equation
        loss = -completion_logps(model, tokens, completion_mask).sum() / args.batch_size

        # ---- update
        loss.backward()
        loss = loss.detach()
        add_up([loss, *(p.grad for p in model.parameters())])
        if not loss.isfinite():
            raise InputError(f"the loss is not finite at step {step}; try a lower --lr")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

        # ---- log
        losses.append(loss.item())
        seconds += time.perf_counter() - started  # of training, without the measurements
        if rank == 0 and (step % look_every == 0 or step == args.steps):
            with torch.no_grad():
                validation_loss = -completion_logps(model, *validation_batch).mean().item()
            answers = generate(model, prompts, generator=generator)
            record = {
                "step": step,
                "equations": step * args.batch_size,
                "seconds": seconds,
                "loss": float(np.mean(losses[-look_every:])),
                "gap": validation_loss - entropy_floor(map("".join, validation)),
                "exact": measure(map("".join, zip(prompts, answers)), 3)["exact"],
            }
            log.append(record)
            tqdm.write(f"step {step:>5}  gap {record['gap']:.3f}  exact {record['exact']:.3f}")

    # ---- save
    if rank == 0:
        if not np.isfinite(record["gap"]):
            raise InputError("the model is not finite; try a lower --lr")
        save_checkpoint(args.out, model, vars(args), log)
        gap, exact = record["gap"], record["exact"]
        print(f"Wrote {args.out} and its log: gap {gap:.3f} nats, exact {exact:.3f}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
