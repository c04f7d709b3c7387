"""Stage 2, Direct Preference Optimization: the model learns to prefer right answers of three terms.

    python train_dpo.py                    # writes runs/dpo.pt and its log, runs/dpo.jsonl
    python train_dpo.py --pairs offline --out runs/dpo_offline.pt   # the classic way: it fails

The SFT model is loaded twice: as the policy, which is trained, and as the reference, which is not.
Left out on purpose: mixed precision, gradient accumulation, reference log-probs computed ahead
(most pairs are new in every step). train_sft.py has the same headings in the same order: a diff
of the two files shows what DPO changes.
"""

import math
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import MIN_SUM, PAD, TERM_COUNTS, InputError, collate, compositions, decode
from data import is_exact, is_preferred, longest_completion, make_parser, parse, positive_float
from data import positive_int, random_pairs, read_pairs, replacing, run_script, seen_sums
from data import training_flags
from model import add_up, completion_logps, find_device, fingerprint, generate, join_processes
from model import load_checkpoint, log_path, save_checkpoint, write_record

OWN_ANSWERS = 16  # times a run that the policy's own answers are looked at
OWN_SAMPLES = 5  # of every sum, each time
OWN_SEED = 1_000_005


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    loss="sigmoid",
    label_smoothing=0.0,
):
    """The DPO loss (arXiv 2305.18290, eq. 7) of a batch of pairs, or a variant of it.

    Takes summed completion log-probs in nats, (B,) each, and beta > 0, which scales the pull to
    the reference. Returns (losses, chosen_rewards, rejected_rewards), (B,) each, the rewards
    detached. With z the log-ratio of chosen less that of rejected, and e = label_smoothing:

        reward   r = beta log(pi / pi_ref)
        sigmoid  -(1 - e) log sigmoid(beta z) - e log sigmoid(-beta z)     log 2 where pi == pi_ref
                 e is the share of pairs labelled the wrong way round (Mitchell's conservative DPO)
        ipo      (z - 1 / (2 beta))^2      (arXiv 2310.12036, eq. 17, on summed log-probs)
        sft      -log pi(chosen)           imitation, the paper's Preferred-FT: beta plays no part
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    z = chosen_logratios - rejected_logratios
    if loss == "sigmoid":
        right, wrong = F.logsigmoid(beta * z), F.logsigmoid(-beta * z)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    elif loss == "ipo":
        losses = (z - 1 / (2 * beta)) ** 2
    else:
        losses = -policy_chosen_logps
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def parse_args(argv=None):
    parser = make_parser("Train the SFT model to prefer a number of terms.", [training_flags()])
    parser.set_defaults(steps=500, batch_size=128, lr=3e-3, out="runs/dpo.pt")
    add = parser.add_argument
    add("--sft", default="runs/sft.pt", help="checkpoint to start from, and the reference")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=3, help="to be preferred")
    add("--beta", type=positive_float, default=0.8, help="scale of the pull to the reference")
    add("--loss", choices=("sigmoid", "ipo", "sft"), default="sigmoid", help="see dpo_loss")
    add("--label-smoothing", type=float, default=0.0, help="share of labels taken for wrong")
    add("--nll-weight", type=float, default=0.0, help="of -log pi(chosen) beside the loss")
    add("--pairs", default="online", metavar="SOURCE", help=SOURCES_HELP)
    add("--answers", type=positive_int, default=2, help="to a prompt, where both sides are sampled")
    add("--judge-reward", type=positive_float, metavar="R", help=JUDGE_HELP)
    args = parser.parse_args(argv)
    if not 0 <= args.label_smoothing < 0.5 or (args.label_smoothing and args.loss != "sigmoid"):
        parser.error("--label-smoothing is a share from 0 to below 0.5, for --loss sigmoid alone")
    if not 0 <= args.nll_weight < math.inf:
        parser.error("--nll-weight is a number from 0")
    if args.answers < 2:
        parser.error("--answers is at least 2")
    if args.pairs not in SAMPLED and (args.answers > 2 or args.judge_reward):
        parser.error("--answers and --judge-reward are for --pairs reference and on-policy")
    written = {os.path.realpath(path) for path in (args.out, log_path(args.out))}
    if written & {os.path.realpath(p) for p in (args.sft, log_path(args.sft), args.pairs)}:
        parser.error(f"--out {args.out} or its log would replace a file of --sft or --pairs")
    return args


SAMPLED = ("reference", "on-policy")
SOURCES_HELP = (
    "online: chosen is written by the generator, rejected is what the policy answers now; "
    "offline: the generator writes both sides, right sums both; "
    "reference, on-policy: a judge compares answers of the SFT model, or of the policy as it is; "
    "or a FILE of JSON lines {prompt, chosen, rejected}"
)
JUDGE_HELP = (
    "the judge errs as Bradley and Terry say, preferred answers having the reward R and others 0; "
    "left out, it never errs, and of two equals it makes no pair"
)

# ---- where pairs come from -------------------------------------------------------------------


class Batch(NamedTuple):
    """R completions, P pairs of them, and those whose likelihood --nll-weight holds up."""

    tokens: torch.Tensor  # (R, T)
    completion_mask: torch.Tensor  # (R, T)
    chosen: torch.Tensor  # (P,) rows
    rejected: torch.Tensor  # (P,) rows
    anchor: torch.Tensor  # (A,) rows


def pair_batches(args, policy, reference, rank, world):
    """A Batch for every step: this process's part of a draw that is the same in all of them."""
    rng = np.random.default_rng(args.seed)
    generator = torch.Generator(policy.head.weight.device).manual_seed(args.seed * world + rank)
    sums, part = seen_sums(policy.config.max_sum), slice(rank, None, world)
    if args.pairs not in ("offline", "online", *SAMPLED):
        pairs = shuffled_forever(
            read_pairs(args.pairs, longest_completion(policy.config.max_sum)), rng
        )
    while True:
        asked = rng.choice(sums, args.batch_size)
        if args.pairs in SAMPLED:
            sampler = reference if args.pairs == "reference" else policy
            coins = rng.random((len(asked), math.comb(args.answers, 2)))
            yield judged_answers(args, sampler, generator, asked[part], coins[part])
        elif args.pairs == "online":
            written = compositions(rng, asked, np.full(len(asked), args.preferred_terms))
            yield own_mistakes(args, policy, generator, asked[part], written[part])
        elif args.pairs == "offline":
            drawn = random_pairs(rng, args.batch_size, sums, args.preferred_terms)
            yield written_pairs(drawn[part])
        else:
            yield written_pairs([next(pairs) for _ in range(args.batch_size)][part])


def shuffled_forever(pairs, rng):
    """The pairs in random order, then again in another."""
    while True:
        for i in rng.permutation(len(pairs)):
            yield pairs[i]


def written_pairs(pairs):
    """Pairs (prompt, chosen, rejected) as a Batch."""
    chosen = [(prompt, chosen) for prompt, chosen, _ in pairs]
    rejected = [(prompt, rejected) for prompt, _, rejected in pairs]
    rows = torch.arange(len(pairs))
    return Batch(*collate(chosen + rejected), rows, rows + len(pairs), anchor=rows)


def own_mistakes(args, policy, generator, asked, written):
    """Every answer of the policy to the sums `asked` that is not preferred, below a `written` one.

    An answer that is preferred leaves nothing to reject. So there are ever fewer pairs, down to
    none, and they are used as they are: to repeat the last few mistakes until they fill a batch
    would push them far too hard. The anchor is every written answer, whatever the policy's was.
    """
    tokens, completion_mask = generate(policy, [f"{n}=" for n in asked], generator=generator)
    mistaken = [i for i, row in enumerate(tokens.tolist()) if not preferred(row, args)]
    kept = range(len(asked)) if args.nll_weight else mistaken
    examples = [(f"{asked[i]}=", written[i]) for i in kept]
    batch = stack(collate(examples), (tokens[mistaken], completion_mask[mistaken]))
    rows = torch.arange(len(kept))
    chosen = torch.tensor(mistaken, dtype=torch.long) if args.nll_weight else rows
    return Batch(*batch, chosen, torch.arange(len(kept), len(kept) + len(mistaken)), anchor=rows)


def judged_answers(args, model, generator, asked, coins):
    """Several answers of a model to each of the sums `asked`, and all pairs that a judge decides.

    `coins` (sums, comparisons), uniform on 0..1, are the judge's luck.
    """
    prompts = [f"{n}=" for n in asked for _ in range(args.answers)]
    tokens, completion_mask = generate(model, prompts, generator=generator)
    reward = np.array([preferred(row, args) for row in tokens.tolist()], float)  # (R,)
    one, other = np.triu_indices(args.answers, 1)  # (comparisons,)
    starts = args.answers * np.arange(len(asked))[:, None]
    one, other = (starts + one).ravel(), (starts + other).ravel()
    better = reward[one] - reward[other]  # 1, 0 or -1
    if args.judge_reward:
        chance = torch.from_numpy(args.judge_reward * better).sigmoid().numpy()
        wins = coins.ravel() < chance
    else:
        one, other, better = one[better != 0], other[better != 0], better[better != 0]
        wins = better > 0
    pairs = np.where(wins, (one, other), (other, one))  # (2, P): chosen above rejected
    rows, index = np.unique(pairs, return_inverse=True)  # an answer in no pair is left out
    chosen, rejected = torch.from_numpy(index.reshape(2, -1))
    rows = torch.from_numpy(rows).to(tokens.device)
    return Batch(tokens[rows], completion_mask[rows], chosen, rejected, anchor=chosen)


def preferred(row, args):
    return is_preferred(decode(row), args.preferred_terms)


def stack(upper, lower):
    """Two batches (tokens, completion_mask) as one, on the device of the lower."""
    T = max(upper[0].shape[1], lower[0].shape[1])
    return [
        torch.cat(
            [F.pad(x.to(below.device), (0, T - x.shape[1]), value=pad) for x in (above, below)]
        )
        for above, below, pad in zip(upper, lower, (PAD, False))
    ]


# ---- what the policy has become --------------------------------------------------------------


@torch.no_grad()
def own_answers(policy, reference, preferred_terms, rank, world):
    """What the policy itself answers now: shares of its samples over all sums, and its KL in nats.

    No pair shows this: an answer that none of them holds may become likely, unseen.
    """
    device = policy.head.weight.device
    prompts = [f"{n}=" for n in range(MIN_SUM, policy.config.max_sum + 1)] * OWN_SAMPLES
    generator = torch.Generator(device).manual_seed(OWN_SEED + rank)
    tokens, completion_mask = generate(policy, prompts[rank::world], generator=generator)
    answers = [decode(row) for row in tokens.tolist()]
    parsed = [terms for _, terms in filter(None, map(parse, answers))]
    logps, ref_logps = (completion_logps(m, tokens, completion_mask) for m in (policy, reference))
    totals = {
        "own/preferred": sum(is_preferred(answer, preferred_terms) for answer in answers),
        "own/form": sum(len(terms) == preferred_terms for terms in parsed),
        "own/exact": sum(map(is_exact, answers)),
        "own/parsed": len(parsed),
        "own/kl": (logps - ref_logps).sum().item(),
    }
    sums = torch.tensor([float(total) for total in totals.values()], device=device)
    add_up([sums])
    return dict(zip(totals, (sums / len(prompts)).tolist()))


def diagnosis(first, last, pairs):
    """One line that says how a run ended, from its first and last log records, and what to try."""
    facts = (
        f"Of the policy's own answers {first['own/preferred']:.2f} -> {last['own/preferred']:.2f} "
        f"are preferred and {first['own/exact']:.2f} -> {last['own/exact']:.2f} exact, "
        f"at {last['own/kl']:.2f} nats from the reference"
    )
    if last["own/exact"] < first["own/exact"] - 0.05:
        cure = "a lower --lr" if pairs == "online" else "--pairs online or --nll-weight 1"
        return f"{facts}. Mass moved to answers that no pair mentions; try {cure}."
    if last["own/preferred"] < 0.9:
        return f"{facts}. The preference is not learned yet; try more --steps or a higher --lr."
    return f"{facts}."


def main(args):
    # ---- setup
    device = find_device(args.device)
    rank, world = join_processes(device)

    # ---- model: the SFT model twice, as the policy and as the frozen reference
    policy, _ = load_checkpoint(args.sft, device)
    reference, _ = load_checkpoint(args.sft, device)
    reference.requires_grad_(False)

    # ---- data: pairs, new in every step unless they come from a file
    batches = pair_batches(args, policy, reference, rank, world)
    asked_pairs = args.batch_size * math.comb(args.answers, 2)  # a step, for all processes

    # ---- optimizer: AdamW for every weight; with Muon the same share cost more KL
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    rise = max(1, round(0.05 * args.steps))
    schedule = LambdaLR(optimizer, lambda done: min((done + 1) / rise, 1 - done / args.steps))

    # ---- the policy that is measured and kept: an average over the steps, step n weighted by n^3
    # (polynomial-decay averaging, arXiv 1212.1824), so half of it is the last sixth of the run
    average = AveragedModel(policy, avg_fn=lambda kept, new, n: kept + (new - kept) / (1 + n / 4))
    kept_policy = average.module

    # ---- the loop
    own_every = max(1, args.steps // OWN_ANSWERS)
    first = last = own_answers(kept_policy, reference, args.preferred_terms, rank, world)
    pairs_seen, seconds = 0, 0.0
    with (
        replacing(args.out, log_path(args.out), keep=rank == 0) as (checkpoint_file, log),
        tqdm(total=args.steps, desc="DPO", disable=rank > 0) as bar,
    ):
        write_record(log, {"step": 0, "pairs": 0, "seconds": 0.0} | first)
        for step in range(1, args.steps + 1):
            # ---- batch
            started = time.perf_counter()
            tokens, completion_mask, chosen, rejected, anchor = (
                x.to(device) for x in next(batches)
            )

            # ---- loss: a completion goes through the model once, in however many pairs it is
            logps = completion_logps(policy, tokens, completion_mask)  # (R,)
            with torch.no_grad():
                ref_logps = completion_logps(reference, tokens, completion_mask)
            both = logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected]
            pair_losses, chosen_rewards, rejected_rewards = dpo_loss(
                *both, args.beta, args.loss, args.label_smoothing
            )
            # Divided by the pairs asked for, so that few mistakes have little weight.
            loss = (pair_losses.sum() - args.nll_weight * logps[anchor].sum()) / asked_pairs

            # ---- update
            loss.backward()
            logged = {
                "loss": pair_losses,
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": chosen_rewards - rejected_rewards,
                "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                "logps/chosen": logps[chosen],
                "logps/rejected": logps[rejected],
            }
            totals = torch.stack([x.detach().sum() for x in (loss, *logged.values())])
            P = torch.tensor(float(len(chosen)), device=device)
            add_up([totals, P, *(p.grad for p in policy.parameters())])
            if not totals[0].isfinite():
                raise InputError(f"the loss is not finite at step {step}: try a lower --lr")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.update_parameters(policy)

            # ---- log
            pairs_seen += int(P)
            seconds += time.perf_counter() - started  # of training: measurements are not counted
            record = {"step": step, "pairs": pairs_seen, "seconds": seconds}
            if P > 0:
                record |= dict(zip(logged, (totals[1:] / P).tolist()))
            if step % own_every == 0 or step == args.steps:
                last = own_answers(kept_policy, reference, args.preferred_terms, rank, world)
                if not math.isfinite(last["own/kl"]):
                    raise InputError(f"the policy is not finite at step {step}: try a lower --lr")
                record |= last
            write_record(log, record)
            shown = {"loss": record.get("loss"), "margin": record.get("rewards/margins")}
            shown |= {name: last[f"own/{name}"] for name in ("preferred", "exact", "kl")}
            bar.set_postfix(
                {k: f"{v:.2f}" for k, v in shown.items() if v is not None}, refresh=False
            )
            bar.update()

        # ---- save
        saved_args = vars(args) | {"reference": fingerprint(reference)}
        save_checkpoint(checkpoint_file, kept_policy, saved_args)
    if rank == 0:
        print(diagnosis(first, last, args.pairs))
        print(f"The model is in {args.out}, its log in {log_path(args.out)}.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
