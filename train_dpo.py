"""Stage 2, Direct Preference Optimization: the model learns to prefer right answers of three terms.

    python train_dpo.py           # rejects the policy's own mistakes; writes runs/dpo.pt and .jsonl
    python train_dpo.py --pairs offline --out runs/dpo_offline.pt   # the classic choice: it fails

The SFT model is loaded twice: as the policy, which is trained, and as the reference, which is not.
A pair is three strings: prompt, chosen, rejected. We left out mixed precision, gradient
accumulation, and reference log-probs computed ahead: most pairs are new in every step. train_sft.py
has the same headings in the same order, so a diff of the two files shows what DPO changes.
"""

import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import DEVICES, MIN_SUM, TERM_COUNTS, InputError, add_up, check_writable
from data import collate, is_preferred, join_processes, log_path, make_parser, mark, measure, number
from data import random_pairs, read_pairs, run_script, seen_sums, shown_sums, shuffled_forever
from model import completion_logps, fingerprint, generate, load_checkpoint, save_checkpoint

EVEN_LOOKS = 16  # measurements a run, evenly spaced; those at steps 0, 1, 2, 4, ... come before
LOOK_SAMPLES = 3  # answers to every sum at each
LOOK_SEED = 1_000_005


# ---- the loss --------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    label_smoothing=0.0,
):
    """The DPO loss of a batch of pairs (arXiv 2305.18290, eq. 7).

    Takes summed completion log-probs in nats, (B,) each, and beta > 0, which scales the pull to the
    reference. Returns (losses, chosen_rewards, rejected_rewards), (B,) each, the rewards detached.
    With z the log-ratio of chosen less that of rejected, the loss is -log sigmoid(beta z): log 2
    where pi equals pi_ref. A reward is beta log(pi / pi_ref). label_smoothing is the share of pairs
    that are labelled the wrong way round (Mitchell's conservative DPO).
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    z = chosen_logratios - rejected_logratios
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * z)
    losses = losses - label_smoothing * F.logsigmoid(-beta * z)
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def ipo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
):
    """The IPO loss (arXiv 2310.12036, eq. 17) on summed log-probs: (z - 1 / (2 beta))^2.

    Takes and returns what dpo_loss does.
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


# ---- where pairs come from -------------------------------------------------------------------
# Each source starts from pairs that the generator wrote, and changes who writes which side. It
# returns pairs, and examples (prompt, chosen) without a pair that --nll-weight holds up as well.


def offline_pairs(written, policy, reference, terms):
    """The classic choice: the generator writes both sides, and both are right."""
    return written, []


def mistake_pairs(written, policy, reference, terms):
    """Chosen stays; rejected is what the policy answers now, if it is not a preferred answer.

    There are ever fewer pairs, down to none. Repeating the last few until they fill a batch would
    push them far too hard.
    """
    answers = generate(policy, [prompt for prompt, _, _ in written])
    pairs, unpaired = [], []
    for (prompt, chosen, _), answer in zip(written, answers):
        if is_preferred(prompt + answer, terms):
            unpaired.append((prompt, chosen))
        else:
            pairs.append((prompt, chosen, answer))
    return pairs, unpaired


def reference_pairs(written, policy, reference, terms):
    """Both sides are answers of the SFT model; a judge tells which is the preferred one."""
    return judged(written, reference, terms), []


def online_pairs(written, policy, reference, terms):
    """Both sides are answers of the policy as it is now (arXiv 2402.04792), judged."""
    return judged(written, policy, terms), []


def judged(written, model, terms):
    """Two answers of a model to each prompt: a pair where exactly one of them is preferred."""
    prompts = [prompt for prompt, _, _ in written]
    pairs = []
    for prompt, one, other in zip(prompts, generate(model, prompts), generate(model, prompts)):
        one_wins, other_wins = (is_preferred(prompt + answer, terms) for answer in (one, other))
        if one_wins != other_wins:
            pairs.append((prompt, one, other) if one_wins else (prompt, other, one))
    return pairs


SOURCES = {
    "offline": offline_pairs,
    "mistakes": mistake_pairs,
    "reference": reference_pairs,
    "online": online_pairs,
}


def parse_args(argv=None):
    parser = make_parser("Train the SFT model to prefer a number of terms.")
    add = parser.add_argument
    add("--steps", type=number(int, 1), default=500, help="updates of the weights")
    add("--batch-size", type=number(int, 1), default=128, help="prompts a step")
    add("--lr", type=number(float, 1e-9), default=3e-3, help="highest learning rate")
    add("--sft", default="runs/sft.pt", help="checkpoint to start from, and the reference")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=3, help="to be preferred")
    add("--pairs", default="mistakes", help=f"{', '.join(SOURCES)}, or a file of JSON lines")
    add("--beta", type=number(float, 1e-9), default=0.8, help="scale of the pull to the reference")
    add("--loss", choices=("sigmoid", "ipo", "sft"), default="sigmoid", help="sft: imitation")
    smoothing = "of the sigmoid loss: share of labels taken to be wrong"
    add("--label-smoothing", type=number(float, 0, 0.499), default=0.0, help=smoothing)
    add("--nll-weight", type=number(float, 0), default=0.0, help="of -log pi(chosen) in the loss")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    add("--out", default="runs/dpo.pt", help="checkpoint; the log is beside it, as .jsonl")
    args = parser.parse_args(argv)
    if args.pairs not in SOURCES and not os.path.isfile(args.pairs):
        parser.error(f"--pairs {args.pairs} is no file, and none of {', '.join(SOURCES)}")
    written = {os.path.realpath(path) for path in (args.out, log_path(args.out))}
    if written & {os.path.realpath(p) for p in (args.sft, log_path(args.sft), args.pairs)}:
        parser.error(f"--out {args.out} or its log would replace a file of --sft or --pairs")
    return args


@torch.no_grad()
def look(policy, reference, terms):
    """Metrics of the policy's own answers with its KL in nats, and three answers, marked.

    No pair shows this: an answer that no pair mentions may become likely, unseen.
    """
    device, max_sum = policy.head.weight.device, policy.config.max_sum
    generator = torch.Generator(device).manual_seed(LOOK_SEED)
    shown = shown_sums(max_sum)
    sums = [*range(MIN_SUM, max_sum + 1)] * LOOK_SAMPLES + shown
    prompts = [f"{n}=" for n in sums]
    examples = list(zip(prompts, generate(policy, prompts, generator=generator)))
    batch = [x.to(device) for x in collate(examples)]
    kl = (completion_logps(policy, *batch) - completion_logps(reference, *batch)).mean().item()
    equations = ["".join(example) for example in examples]
    marks = [mark(equation, terms) for equation in equations[-len(shown) :]]
    return measure(equations, terms) | {"kl": kl}, marks


def averaged(policy):
    """An average over the steps, step n weighted by n^3, so half of it is the last sixth of a run.

    Polynomial-decay averaging, arXiv 1212.1824.
    """
    return AveragedModel(policy, avg_fn=lambda kept, new, n: kept + (new - kept) / (1 + n / 4))


def main(args):
    # ---- setup
    rank, world = join_processes()
    if rank == 0:
        print(f"Pairs: {args.pairs}. The classic choice is --pairs offline.")
        check_writable(args.out, log_path(args.out))
    torch.manual_seed(args.seed * world + rank)  # for sampled answers
    rng = np.random.default_rng(args.seed)

    # ---- model: the SFT model twice, as the policy and as the frozen reference
    policy, _ = load_checkpoint(args.sft, args.device)
    reference, _ = load_checkpoint(args.sft, args.device)
    reference.requires_grad_(False)

    # ---- data: pairs, new in every step unless they come from a file
    max_sum, terms = policy.config.max_sum, args.preferred_terms
    sums = seen_sums(max_sum)
    if args.pairs in SOURCES:
        source = SOURCES[args.pairs]
    else:
        source, next_pairs = offline_pairs, shuffled_forever(rng, read_pairs(args.pairs, max_sum))

    # ---- optimizer: AdamW for every weight; with Muon, mistakes cost more KL at the same share
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    warmup = max(1, round(0.05 * args.steps))

    # ---- the policy that is measured and kept: an average over the steps
    average = averaged(policy)

    # ---- the loop
    even_looks = [round(i * args.steps / EVEN_LOOKS) for i in range(EVEN_LOOKS + 1)]
    looks = {*even_looks, *(2**i for i in range(even_looks[1].bit_length()))}
    log, pairs_seen, seconds = [], 0, 0.0
    bar = tqdm(range(args.steps + 1), total=args.steps, desc="DPO", disable=rank > 0)
    for step in bar:
        # ---- look at the answers of the averaged policy
        if rank == 0 and step in looks:
            own, marks = look(average.module, reference, terms)
            if not math.isfinite(own["kl"]):
                raise InputError(f"the policy is not finite at step {step}; try a lower --lr")
            log.append({"step": step, "own": own})
            tqdm.write(f"step {step:>4}  " + "  ".join(f"{text:<31}" for text in marks))
        if step == args.steps:
            break

        # ---- learning rate: it rises, stays, and falls to zero over the last 70 %
        started = time.perf_counter()
        lr = args.lr * min((step + 1) / warmup, 1, (1 - step / args.steps) / 0.7)
        optimizer.param_groups[0]["lr"] = lr

        # ---- batch: one draw for all processes, of which each takes its part
        if args.pairs in SOURCES:
            written = random_pairs(rng, args.batch_size, sums, terms)
        else:
            written = [next(next_pairs) for _ in range(args.batch_size)]
        pairs, unpaired = source(written[rank::world], policy, reference, terms)
        examples = [(prompt, chosen) for prompt, chosen, _ in pairs]
        examples += [(prompt, rejected) for prompt, _, rejected in pairs]
        examples += unpaired if args.nll_weight else []
        tokens, completion_mask = (x.to(args.device) for x in collate(examples))

        # ---- loss: divided by the prompts of the step, so few mistakes have little weight
        P = len(pairs)
        logps = completion_logps(policy, tokens, completion_mask)  # (2P + unpaired,)
        with torch.no_grad():
            ref_logps = completion_logps(reference, tokens[: 2 * P], completion_mask[: 2 * P])
        chosen_logps, rejected_logps, unpaired_logps = logps.tensor_split([P, 2 * P])
        pair_logps = chosen_logps, rejected_logps, *ref_logps.split([P, P])
        if args.loss == "ipo":
            losses, chosen_rewards, rejected_rewards = ipo_loss(*pair_logps, args.beta)
        else:
            losses, chosen_rewards, rejected_rewards = dpo_loss(
                *pair_logps, args.beta, args.label_smoothing
            )
        if args.loss == "sft":
            losses = -chosen_logps  # imitation: the paper's Preferred-FT
        nll = -chosen_logps.sum() - unpaired_logps.sum()
        loss = (losses.sum() + args.nll_weight * nll) / args.batch_size

        # ---- update, unless there was nothing to learn from
        loss.backward()
        logged = {
            "loss": losses,
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        totals = torch.stack([x.detach().sum() for x in (loss, *logged.values())])
        counts = torch.tensor([P, len(examples)], device=args.device)
        add_up([totals, counts, *(p.grad for p in policy.parameters())])
        if not totals[0].isfinite():
            raise InputError(f"the loss is not finite at step {step + 1}; try a lower --lr")
        pairs_in_all, examples_in_all = counts.tolist()
        if examples_in_all > 0:
            optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(policy)

        # ---- log
        pairs_seen += pairs_in_all
        seconds += time.perf_counter() - started  # of training, without the looks
        record = {"step": step + 1, "pairs": pairs_seen, "seconds": seconds}
        if pairs_in_all > 0:
            record |= dict(zip(logged, (totals[1:] / pairs_in_all).tolist()))
            bar.set_postfix(loss=f"{record['loss']:.2f}", refresh=False)
        log.append(record)

    # ---- save
    if rank == 0:
        saved_args = vars(args) | {"reference": fingerprint(reference)}
        save_checkpoint(args.out, average.module, saved_args, log)
        first = log[0]["own"]
        changes = [f"{key} {first[key]:.2f} -> {own[key]:.2f}" for key in ("exact", "preferred")]
        facts = f"{', '.join(changes)} ({terms} terms), KL {own['kl']:.2f} nats"
        print(f"Wrote {args.out} and its log: {facts}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
