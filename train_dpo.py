"""Stage 2, Direct Preference Optimization: the model learns to prefer answers of three terms.

    python train_dpo.py                    # writes runs/dpo.pt and its log, runs/dpo.jsonl
    python train_dpo.py --pairs offline --out runs/dpo_offline.pt   # the classic way: it fails

The SFT model is loaded twice: as the policy, which is trained, and as the reference, which is not.
Left out on purpose: mixed precision, gradient accumulation, reference log-probs computed ahead
(online pairs are new in every step). train_sft.py has the same headings in the same order: a diff
of the two files shows what DPO changes.
"""

import itertools
import json
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import (
    MIN_SUM,
    PAD,
    ArgumentParser,
    InputError,
    collate,
    compositions,
    decode,
    diverged,
    integer_in,
    is_preferred,
    parse,
    positive_number,
    random_pairs,
    read_pairs,
    run_script,
    seen_sums,
)
from model import (
    completion_logps,
    data_parallel,
    find_device,
    generate,
    join_processes,
    load_checkpoint,
    open_log,
    save_checkpoint,
)

OWN_ANSWERS = 40  # times a run that the policy's own answers are looked at
OWN_SAMPLES = 5  # of every sum, each time
OWN_SEED = 1_000_005
REFERENCE_SAMPLES = 200  # of every sum, for --pairs reference


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
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    z = chosen_logratios - rejected_logratios
    if loss == "ipo":
        losses = (z - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * z) - label_smoothing * F.logsigmoid(
            -beta * z
        )
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def parse_args(argv=None):
    parser = ArgumentParser(
        description="Train the SFT model to prefer answers of a given number of terms."
    )
    add = parser.add_argument
    # the preference
    add(
        "--sft",
        default="runs/sft.pt",
        help="checkpoint to start from, and the reference (%(default)s)",
    )
    add(
        "--beta",
        type=positive_number,
        default=0.8,
        help="scale of the pull towards the reference (%(default)s)",
    )
    add(
        "--preferred-terms",
        type=integer_in(2, 5),
        default=3,
        help="terms of the chosen side (%(default)s)",
    )
    add("--loss", choices=("sigmoid", "ipo"), default="sigmoid", help="(%(default)s)")
    add(
        "--label-smoothing",
        type=float,
        default=0.0,
        help="share of wrong labels the sigmoid loss expects (%(default)s)",
    )
    add(
        "--pairs",
        default="online",
        metavar="SOURCE",
        help="online: rejected is what the policy answers now; "
        "reference: both sides are what the reference answered once; "
        "offline: both sides right, from the generator; "
        "offline-wrong: half of the rejected sum wrong; "
        "or a FILE of JSON lines {prompt, chosen, rejected} (%(default)s)",
    )
    # the run
    add("--steps", type=integer_in(1, 10**9), default=500, help="updates (%(default)s)")
    add("--batch-size", type=integer_in(1, 10**6), default=256, help="prompts a step (%(default)s)")
    add("--lr", type=positive_number, default=3e-3, help="highest learning rate (%(default)s)")
    add("--seed", type=integer_in(0, 2**32), default=0, help="of pairs and samples (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    add("--out", default="runs/dpo.pt", help="checkpoint to write (%(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.label_smoothing < 0.5 or (args.label_smoothing and args.loss != "sigmoid"):
        raise InputError(
            "--label-smoothing is a share from 0 to below 0.5, for --loss sigmoid alone"
        )
    return args


def shuffled_forever(pairs, rng):
    """The pairs in random order, then again in another."""
    while True:
        for i in rng.permutation(len(pairs)):
            yield pairs[i]


def online_pairs(policy, rng, generator, sums, failing, count, preferred_terms):
    """Pairs whose rejected side the policy has just written, as two batches for `stack`.

    Of `count` answers of the policy those that are as preferred are left out: there is nothing to
    reject. The rest get a chosen side from the generator. So there are ever fewer pairs, down to
    none, and they are used as they are: to repeat the last few mistakes until they fill a batch
    would push them far too hard. `failing` (sums,), updated in place, follows each sum's share of
    answers that are not as preferred; the sums that fail most are asked more often.
    """
    chance = failing + 0.1
    asked = rng.choice(len(sums), count, p=chance / chance.sum())
    sums = sums[asked]
    tokens, completion_mask = generate(policy, [f"{n}=" for n in sums], generator=generator)
    wrong = np.array([not is_preferred(decode(row), preferred_terms) for row in tokens.tolist()])
    failing[asked] += 0.1 * (wrong - failing[asked])
    chosen = compositions(rng, sums[wrong], np.full(wrong.sum(), preferred_terms))
    wrong_rows = torch.from_numpy(wrong).to(tokens.device)
    return (
        collate([(f"{n}=", completion) for n, completion in zip(sums[wrong], chosen)]),
        (tokens[wrong_rows], completion_mask[wrong_rows]),
    )


def reference_pairs(reference, rng, generator, sums, preferred_terms):
    """Pairs of answers that the reference gave, once, before training."""
    prompts = [f"{n}=" for n in sums for _ in range(REFERENCE_SAMPLES)]
    tokens, _ = generate(reference, prompts, generator=generator)
    answers = [decode(row) for row in tokens.tolist()]
    pairs = []
    for start in range(0, len(answers), REFERENCE_SAMPLES):
        pairs += paired(
            rng.permutation(answers[start : start + REFERENCE_SAMPLES]), preferred_terms
        )
    if not pairs:
        raise InputError(
            "--pairs reference finds no preferred answer of the SFT model; train it for longer"
        )
    return pairs


def paired(equations, preferred_terms):
    """Answers to one prompt as pairs (prompt, chosen, rejected), each answer in one pair at most.

    ["9=4+5", "9=3+3+3", "9=1+2+6"], 3 -> [("9=", "3+3+3", "4+5")]
    """
    texts = [equation.split("=") for equation in equations if parse(equation)]
    chosen = [
        completion for n, completion in texts if is_preferred(f"{n}={completion}", preferred_terms)
    ]
    rejected = [
        completion
        for n, completion in texts
        if not is_preferred(f"{n}={completion}", preferred_terms)
    ]
    return [(f"{texts[0][0]}=", *pair) for pair in zip(chosen, rejected)]


def given_pairs(pairs):
    """Pairs (prompt, chosen, rejected) as two batches for `stack`."""
    chosen = collate([(prompt, chosen) for prompt, chosen, _ in pairs])
    rejected = collate([(prompt, rejected) for prompt, _, rejected in pairs])
    return chosen, rejected


def stack(chosen, rejected, device):
    """Two batches (tokens, completion_mask) of P rows as one of 2P, chosen above rejected."""
    longest = max(chosen[0].shape[1], rejected[0].shape[1])
    return [
        torch.cat(
            [F.pad(part.to(device), (0, longest - part.shape[1]), value=filler) for part in parts]
        )
        for filler, parts in ((PAD, (chosen[0], rejected[0])), (False, (chosen[1], rejected[1])))
    ]


@torch.no_grad()
def own_answers(policy, reference, preferred_terms):
    """What the policy itself answers now: shares of its samples over all sums, and its KL in nats.

    No pair shows this: an answer that none of them holds may become likely, unseen.
    """
    device = policy.head.weight.device
    prompts = [f"{n}=" for n in range(MIN_SUM, policy.config.max_sum + 1)] * OWN_SAMPLES
    generator = torch.Generator(device).manual_seed(OWN_SEED)
    tokens, completion_mask = generate(policy, prompts, generator=generator)
    parsed = [parse(decode(row)) for row in tokens.tolist()]
    exact = [p is not None and p[0] == sum(p[1]) for p in parsed]
    preferred = [p is not None and len(p[1]) == preferred_terms for p in parsed]
    logps, ref_logps = (completion_logps(m, tokens, completion_mask) for m in (policy, reference))
    return {
        "own/preferred": float(np.mean(preferred)),
        "own/exact": float(np.mean(exact)),
        "own/preferred_exact": float(np.mean(np.logical_and(preferred, exact))),
        "own/parsed": float(np.mean([p is not None for p in parsed])),
        "own/kl": (logps - ref_logps).mean().item(),
    }


def diagnosis(records, pairs):
    """One line that says how the run of these log records ended, and what to try if not well."""
    before, after = records[0], [record for record in records if "own/kl" in record][-1]
    with_pairs = [record for record in records if "rewards/margins" in record]
    if not with_pairs:
        return "Every answer was as preferred from the start: there was no pair to learn from."
    last_pairs = with_pairs[-1]
    facts = (
        f"margin {last_pairs['rewards/margins']:.1f}, "
        f"pair accuracy {last_pairs['rewards/accuracies']:.2f}; of the policy's own answers "
        f"{before['own/preferred']:.2f} -> {after['own/preferred']:.2f} have the preferred form, "
        f"{before['own/exact']:.2f} -> {after['own/exact']:.2f} are exact; "
        f"KL {after['own/kl']:.2f} nats"
    )
    if after["own/exact"] < before["own/exact"] - 0.05:
        cure = "a lower --lr" if pairs == "online" else "--pairs online"
        return f"{facts}. Mass moved to answers that no pair mentions; try {cure}."
    if after["own/preferred"] < 0.9:
        return f"{facts}. The preference is not learned yet; try more --steps or a higher --lr."
    return f"{facts}. The preference is learned and arithmetic has not suffered."


def main(args):
    # ---- setup
    rank, world = join_processes(args)
    device = find_device(args.device)
    rng = np.random.default_rng([args.seed, rank])
    generator = torch.Generator(device).manual_seed(args.seed * world + rank)

    # ---- model: the SFT model twice, as the policy and as the frozen reference
    policy, _ = load_checkpoint(args.sft, device)
    reference, _ = load_checkpoint(args.sft, device)
    reference.requires_grad_(False)
    parallel_policy = data_parallel(policy, world)

    # ---- data: pairs, new in every step unless they come from a file
    sums = np.array(seen_sums(policy.config.max_sum))
    failing = np.ones(len(sums))
    count = args.batch_size // world
    if args.pairs == "reference":
        fixed_pairs = shuffled_forever(
            reference_pairs(reference, rng, generator, sums, args.preferred_terms), rng
        )
    elif args.pairs not in ("online", "offline", "offline-wrong"):
        fixed_pairs = shuffled_forever(read_pairs(args.pairs, policy.config.block_size), rng)

    # ---- optimizer: AdamW for every weight. Muon moves all directions of a matrix equally far, which
    # learns equations fast, but here much of that is drift: it pays a tenth more KL.
    optimizer = torch.optim.AdamW(
        policy.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    rise = max(1, round(0.05 * args.steps))
    schedule = LambdaLR(optimizer, lambda done: min((done + 1) / rise, 1 - done / args.steps))

    # ---- the policy that is measured and kept: an average over the steps, step n weighted by n^3
    # (polynomial-decay averaging, arXiv 1212.1824), so half of it is the last sixth of the run.
    # No pair opposes a drift from one right answer to another, but much of it averages out.
    average = AveragedModel(policy, avg_fn=lambda kept, new, n: kept + (new - kept) / (1 + n / 4))
    kept_policy = average.module

    # ---- the loop
    own_every = max(1, args.steps // OWN_ANSWERS)
    losses, pairs_seen, seconds, shown = [], 0, 0.0, {}
    records = [
        {"step": 0, "pairs": 0, "seconds": 0.0}
        | own_answers(kept_policy, reference, args.preferred_terms)
    ]
    with (
        open_log(args.out, rank) as log,
        tqdm(total=args.steps, desc="DPO", disable=rank > 0) as bar,
    ):
        print(json.dumps(records[0]), file=log)
        for step in range(1, args.steps + 1):
            # ---- batch: P chosen sides above P rejected ones
            started = time.perf_counter()
            if args.pairs == "online":
                pairs = online_pairs(
                    policy, rng, generator, sums, failing, count, args.preferred_terms
                )
            elif args.pairs in ("offline", "offline-wrong"):
                wrong_share = 0.5 if args.pairs == "offline-wrong" else 0.0
                pairs = given_pairs(
                    random_pairs(rng, count, sums, args.preferred_terms, wrong_share)
                )
            else:
                pairs = given_pairs(list(itertools.islice(fixed_pairs, count)))
            tokens, completion_mask = stack(*pairs, device)  # (2P, T)
            P = len(tokens) // 2

            # ---- loss: both sides in one forward pass
            logps = completion_logps(parallel_policy, tokens, completion_mask)  # (2P,)
            with torch.no_grad():
                ref_logps = completion_logps(reference, tokens, completion_mask)
            pair_losses, chosen_rewards, rejected_rewards = dpo_loss(
                logps[:P],
                logps[P:],
                ref_logps[:P],
                ref_logps[P:],
                args.beta,
                args.loss,
                args.label_smoothing,
            )
            loss = pair_losses.sum() / count  # over all prompts: few mistakes, little weight

            # ---- update
            if not loss.isfinite():
                raise diverged(step, losses, args.out)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.update_parameters(policy)

            # ---- log
            losses.append(loss.item())
            seconds += time.perf_counter() - started  # of training: measurements are not counted
            pairs_seen += P * world
            records.append({"step": step, "pairs": pairs_seen, "seconds": seconds})
            if P > 0:
                margins = chosen_rewards - rejected_rewards
                records[-1] |= {
                    "loss": pair_losses.mean().item(),
                    "rewards/chosen": chosen_rewards.mean().item(),
                    "rewards/rejected": rejected_rewards.mean().item(),
                    "rewards/margins": margins.mean().item(),
                    "rewards/accuracies": (margins > 0).float().mean().item(),
                    "logps/chosen": logps[:P].mean().item(),
                    "logps/rejected": logps[P:].mean().item(),
                }
            if step % own_every == 0 or step == args.steps:
                records[-1] |= own_answers(kept_policy, reference, args.preferred_terms)
                if not math.isfinite(records[-1]["own/kl"]):
                    raise diverged(step, losses, args.out)
            shown |= {
                key: f"{value:.2f}"
                for key, value in records[-1].items()
                if key == "loss" or "/" in key
            }
            bar.set_postfix(shown, refresh=False)
            bar.update()
            print(json.dumps(records[-1]), file=log, flush=True)

    # ---- save
    if rank == 0:
        save_checkpoint(args.out, kept_policy, vars(args))
        print(diagnosis(records, args.pairs))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
