"""Stage 2, Direct Preference Optimization: the model learns to prefer answers of three terms.

    python train_dpo.py                                            # writes runs/dpo.pt, runs/dpo.jsonl
    python train_dpo.py --pairs offline --out runs/dpo_offline.pt  # the classic way, which fails here

The SFT model is loaded twice: as the policy, which is trained, and as the reference, which is not.
Left out on purpose: mixed precision, gradient accumulation, reference log-probs computed ahead
(online pairs are new in every step). train_sft.py has the same headings in the same order: a diff
of the two files shows what DPO changes.
"""

import itertools
import json
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (
    MIN_SUM, PAD, ArgumentParser, collate, compositions, decode, diverged, integer_in, parse,
    positive_number, random_pairs, read_pairs, run_script, seen_sums,
)
from model import (
    completion_logps, data_parallel, find_device, generate, join_processes, load_checkpoint,
    muon_and_adamw, open_log, save_checkpoint,
)

OWN_ANSWERS = 40  # times a run that the policy's own answers are looked at
OWN_SAMPLES = 5  # of every sum, each time
OWN_SEED = 1_000_005


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """The sigmoid DPO loss (arXiv 2305.18290, eq. 7) of a batch of pairs.

    Takes summed completion log-probs in nats, (B,) each, and beta > 0, the strength of the pull
    towards the reference. Returns (losses, chosen_rewards, rejected_rewards), (B,) each, the
    rewards detached. With policy == reference every loss is log 2.

        reward r = beta (log pi - log pi_ref)       loss = -log sigmoid(r_chosen - r_rejected)
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def parse_args(argv=None):
    parser = ArgumentParser(description="Train the SFT model to prefer answers of a given number of terms.")
    add = parser.add_argument
    # the preference
    add("--sft", default="runs/sft.pt", help="checkpoint to start from, and the reference (%(default)s)")
    add("--beta", type=positive_number, default=0.8, help="pull towards the reference (%(default)s)")
    add("--preferred-terms", type=integer_in(2, 5), default=3, help="terms of the chosen side (%(default)s)")
    add("--pairs", default="online",
        help="online: rejected is what the policy answers now; offline: both sides from the generator; "
        "or a FILE of JSON lines {prompt, chosen, rejected} (%(default)s)")
    # the run
    add("--steps", type=integer_in(1, 10**9), default=200, help="updates (%(default)s)")
    add("--batch-size", type=integer_in(1, 10**6), default=128, help="prompts a step (%(default)s)")
    add("--lr", type=positive_number, default=2e-4, help="highest learning rate (%(default)s)")
    add("--seed", type=integer_in(0, 2**32), default=0, help="of pairs and samples (%(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps, ... (%(default)s)")
    add("--out", default="runs/dpo.pt", help="checkpoint to write (%(default)s)")
    return parser.parse_args(argv)


def is_preferred(equation, preferred_terms):
    """Whether an answer is what we want: right, and of the preferred number of terms."""
    parsed = parse(equation)
    return parsed is not None and parsed[0] == sum(parsed[1]) and len(parsed[1]) == preferred_terms


def shuffled_forever(pairs, rng):
    """The pairs in random order, then again in another."""
    while True:
        for i in rng.permutation(len(pairs)):
            yield pairs[i]


def online_pairs(policy, rng, generator, sums, count, preferred_terms):
    """Pairs whose rejected side the policy has just written, as two batches for `stack`.

    Of `count` answers of the policy those that are as preferred are left out: there is nothing to
    reject. The rest get a chosen side from the generator. So there are ever fewer pairs, down to
    none, and they are used as they are: to repeat the last few mistakes until they fill a batch
    would push them far too hard.
    """
    sums = rng.choice(sums, count)
    tokens, completion_mask = generate(policy, [f"{n}=" for n in sums], generator=generator)
    wrong = np.array([not is_preferred(decode(row), preferred_terms) for row in tokens.tolist()])
    chosen = compositions(rng, sums[wrong], np.full(wrong.sum(), preferred_terms))
    wrong_rows = torch.from_numpy(wrong).to(tokens.device)
    return (
        collate([(f"{n}=", completion) for n, completion in zip(sums[wrong], chosen)]),
        (tokens[wrong_rows], completion_mask[wrong_rows]),
    )


def given_pairs(pairs):
    """Pairs (prompt, chosen, rejected) as two batches for `stack`."""
    chosen = collate([(prompt, chosen) for prompt, chosen, _ in pairs])
    rejected = collate([(prompt, rejected) for prompt, _, rejected in pairs])
    return chosen, rejected


def stack(chosen, rejected, device):
    """Two batches (tokens, completion_mask) of P rows as one of 2P, chosen above rejected."""
    longest = max(chosen[0].shape[1], rejected[0].shape[1])
    return [
        torch.cat([F.pad(part.to(device), (0, longest - part.shape[1]), value=filler) for part in parts])
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
    count = args.batch_size // world
    if args.pairs not in ("online", "offline"):
        file_pairs = shuffled_forever(read_pairs(args.pairs, policy.config.block_size), rng)

    # ---- optimizer
    optimizers, schedules = muon_and_adamw(policy, args.lr, args.steps)

    # ---- the loop
    own_every = max(1, args.steps // OWN_ANSWERS)
    losses, pairs_seen, shown, started = [], 0, {}, time.perf_counter()
    with open_log(args.out, rank) as log, tqdm(total=args.steps, desc="DPO", disable=rank > 0) as bar:
        for step in range(1, args.steps + 1):
            # ---- batch: P chosen sides above P rejected ones
            if args.pairs == "online":
                pairs = online_pairs(policy, rng, generator, sums, count, args.preferred_terms)
            elif args.pairs == "offline":
                pairs = given_pairs(random_pairs(rng, count, sums, args.preferred_terms))
            else:
                pairs = given_pairs(list(itertools.islice(file_pairs, count)))
            tokens, completion_mask = stack(*pairs, device)  # (2P, T)
            P = len(tokens) // 2

            # ---- loss: both sides in one forward pass
            logps = completion_logps(parallel_policy, tokens, completion_mask)  # (2P,)
            with torch.no_grad():
                ref_logps = completion_logps(reference, tokens, completion_mask)
            pair_losses, chosen_rewards, rejected_rewards = dpo_loss(
                logps[:P], logps[P:], ref_logps[:P], ref_logps[P:], args.beta
            )
            loss = pair_losses.sum() / count  # over all prompts: few pairs left, small steps

            # ---- update
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if not gradient_norm.isfinite():
                raise diverged(step, losses, args.out)
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

            # ---- log
            losses.append(loss.item())
            pairs_seen += P * world
            bar.update()
            if rank > 0:
                continue
            record = {"step": step, "pairs": pairs_seen, "seconds": time.perf_counter() - started}
            if P > 0:
                margins = chosen_rewards - rejected_rewards
                record |= {
                    "loss": pair_losses.mean().item(),
                    "rewards/chosen": chosen_rewards.mean().item(),
                    "rewards/rejected": rejected_rewards.mean().item(),
                    "rewards/margins": margins.mean().item(),
                    "rewards/accuracies": (margins > 0).float().mean().item(),
                    "logps/chosen": logps[:P].mean().item(),
                    "logps/rejected": logps[P:].mean().item(),
                }
            if step % own_every == 0 or step == args.steps:
                record |= own_answers(policy, reference, args.preferred_terms)
            print(json.dumps(record), file=log, flush=True)
            shown |= {key: f"{value:.2f}" for key, value in record.items() if isinstance(value, float)}
            bar.set_postfix(shown)

    # ---- save
    if rank == 0:
        save_checkpoint(args.out, policy, vars(args))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
