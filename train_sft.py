"""Stage 1, supervised fine-tuning: a small Transformer learns to write right equations.

    python train_sft.py

This writes runs/sft.pt. The loss is next-token cross-entropy on the completions of equations that
are drawn fresh for every step. We left out epochs, a stored training set and resuming: a run takes
minutes. train_dpo.py has the same headings in the same order: compare them heading by heading.
"""

import random
from statistics import fmean

import torch
from tqdm import tqdm

from data import (DEVICES, MIN_SUM, check_writable, collate, entropy_floor, is_exact, make_parser,
                  number, random_equations, run_script, seen_sums)  # fmt: skip
from model import GPT, GPTConfig, answers_to, completion_logps, logps_of, save_checkpoint

LOOKS = 30  # measurements per run
SFT_FALL = 0.4  # share of the steps over which the learning rate falls to zero
ADAMW_FACTOR = 3  # the rate of AdamW over that of Muon; embeddings and head need larger steps
VALIDATION_SEED = 1_000_003  # the same equations whatever the seed of the run


def parse_args(argv=None):
    parser = make_parser("Train a small Transformer on random equations.")
    add = parser.add_argument
    add("--steps", type=number(int, 1), default=4250, help="updates of the weights")
    add("--batch-size", type=number(int, 1), default=128, help="equations per step")
    add("--lr", type=number(float, 1e-9), default=6e-3, help="highest learning rate")
    add("--depth", type=number(int, 1), default=GPTConfig.depth, help="blocks")
    add("--width", type=number(int, 1), default=GPTConfig.width, help="of the residual stream")
    add("--heads", type=number(int, 1), default=GPTConfig.heads, help="attention heads")
    add("--max-sum", type=number(int, 20, 999), default=GPTConfig.max_sum, help="largest sum")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    add("--out", default="runs/sft.pt", help="checkpoint, with its log")
    args = parser.parse_args(argv)
    if args.width % args.heads:
        parser.error(f"--width {args.width} is not a multiple of --heads {args.heads}")
    return args


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix moves equally far.

    torch.optim.Muon (Jordan et al., 2024) does the same in bfloat16. Many CPUs emulate bfloat16,
    which takes a third of a step, so this version stays in float32.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(average, group["momentum"]))  # as Nesterov's
                rows, columns = p.shape
                p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalise(x):
    """A matrix with the same singular vectors and singular values near 1.

    Newton-Schulz: five rounds of a s + b s^3 + c s^5 take any singular value s from 0.003 to 1 to
    between 0.68 and 1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # those of torch.optim.Muon
    if x.shape[0] > x.shape[1]:
        return orthogonalise(x.T).T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        xx = x @ x.T
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x


def make_optimizers(model, lr):
    """Muon for the matrices of the blocks, and AdamW for all other weights.

    With AdamW for all weights, the gap was 0.42 nats, where it is 0.05 now (measured once, at
    AdamW's rate for all). DPO takes small steps from a trained model, for which AdamW alone is
    enough, so it has one optimizer less.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "blocks" not in name]
    adamw_lr = ADAMW_FACTOR * lr
    adamw = torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    return Muon(matrices, lr), adamw


def learning_rate(highest, step, steps, fall):
    """The rate at `step` of 1, 2, ..., `steps`.

    It rises over the first 5 % of the steps (warmup), stays, and falls to zero over the last ones:
    `fall` is their share of all steps.
    """
    return highest * min(step / (0.05 * steps), 1, (1 - (step - 1) / steps) / fall)


def main(args):
    # ---- setup
    check_writable(args.out)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    # ---- model
    model = GPT(GPTConfig(args.depth, args.width, args.heads, args.max_sum)).to(args.device)

    # ---- data: fresh equations in every step, and a fixed set for validation
    sums, every_sum = seen_sums(args.max_sum), range(MIN_SUM, args.max_sum + 1)
    validation = ["".join(x) for x in random_equations(random.Random(VALIDATION_SEED), 1000, sums)]
    floor = entropy_floor(validation)
    generator = torch.Generator(args.device).manual_seed(VALIDATION_SEED)

    # ---- optimizers: Muon and AdamW
    optimizers = make_optimizers(model, args.lr)

    # ---- the loop
    looks = {round(i * args.steps / LOOKS) for i in range(1, LOOKS + 1)}
    log, losses = [], []
    for step in tqdm(range(1, args.steps + 1), desc="SFT"):
        # ---- learning rate
        for optimizer in optimizers:
            highest = optimizer.defaults["lr"]
            optimizer.param_groups[0]["lr"] = learning_rate(highest, step, args.steps, SFT_FALL)

        # ---- batch
        tokens, completion_mask = collate(random_equations(rng, args.batch_size, sums), args.device)

        # ---- loss: nats per equation
        loss = -completion_logps(model, tokens, completion_mask).mean()

        # ---- update
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # ---- log
        losses.append(loss.item())
        if step in looks:
            answers = answers_to(model, [*every_sum] * 3, generator=generator)
            record = {
                "step": step,
                "equations": step * args.batch_size,
                "loss": fmean(losses),  # since the measurement before
                "gap": -logps_of(model, validation).mean().item() - floor,
                "exact": fmean(map(is_exact, answers)),
            }
            log.append(record)
            losses.clear()
            tqdm.write(f"step {step:>5}  gap {record['gap']:.3f}  exact {record['exact']:.3f}")

    # ---- save
    save_checkpoint(args.out, model, vars(args), log)
    print(f"Wrote {args.out}: gap {record['gap']:.3f} nats, exact {record['exact']:.3f}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
