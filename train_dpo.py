"""Stage 2, Direct Preference Optimization: the model learns to prefer right answers of three terms.

    python train_dpo.py
    python train_dpo.py --pairs offline --out runs/dpo_offline.pt
    python train_dpo.py --pairs offline --kl-weight 0.1 --out runs/dpo_offline_kl.pt

The first command rejects the policy's own mistakes and writes runs/dpo.pt. The second one takes the
usual pairs, which fail. The third one adds what they lack.

The SFT model is loaded twice: as the policy, which is trained, and as the reference, which is not.
A pair is three strings: prompt, chosen, rejected. We left out mixed precision, gradient
accumulation, and reference log-probs computed ahead: most pairs are new in every step. train_sft.py
has the same headings in the same order: compare them heading by heading.
"""

import os
import random

import torch
import torch.nn.functional as F
from torch.optim import AdamW
from tqdm import tqdm

from data import (DEFAULT_TERMS, DEVICES, MIN_SUM, TERM_COUNTS, check_writable, collate,
                  is_preferred, make_parser, mark, measure, number, random_pairs, read_pairs,
                  run_script, seen_sums, shown_sums)  # fmt: skip
from model import (answers_to, completion_logps, device_of, fingerprint, generate, load_checkpoint,
                   logratios_of, save_checkpoint)  # fmt: skip
from train_sft import learning_rate

DPO_FALL = 0.7  # share of the steps over which the learning rate falls to zero
EVEN_LOOKS = 16  # measurements per run, evenly spaced; those at steps 1, 2, 4, ... come before
LOOK_SAMPLES = 3  # answers to every sum at each
LOOK_SEED = 1_000_005


# ---- the losses ------------------------------------------------------------------------------

LOSSES = ("sigmoid", "ipo", "imitation")


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta,
    label_smoothing=0.0,
    ipo=False,
):
    """The DPO loss of a batch of pairs (arXiv 2305.18290, eq. 7), or that of IPO.

    Takes summed completion log-probs in nats, (B,) each, and beta > 0, which scales the pull to the
    reference. Returns (losses, chosen_rewards, rejected_rewards), (B,) each, the rewards detached.
    With z the log-ratio of chosen minus that of rejected, the loss is -log sigmoid(beta z): log 2
    where pi equals pi_ref. A reward is beta log(pi / pi_ref). label_smoothing is the share of pairs
    that are labelled the wrong way round (Mitchell's conservative DPO). IPO has another loss on
    the same z, here of summed log-probs (arXiv 2310.12036, eq. 17).
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    z = chosen_logratios - rejected_logratios
    losses = -F.logsigmoid(beta * z)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-beta * z)
    if ipo:
        losses = (z - 1 / (2 * beta)) ** 2
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def own_answers_loss(policy, reference, prompts, kl_weight, reward=lambda examples: 0):
    """kl_weight times KL(pi || pi_ref) on answers that the policy writes now, minus their reward.

    The DPO loss sees the strings of its pairs alone; this term sees what else became likely (HyPO,
    arXiv 2406.01462). With a reward it is the objective of RLHF. `reward` maps examples
    (prompt, completion) to (B,). With cost_i = kl_weight log(pi / pi_ref)(y_i) - reward_i, held
    fixed, and y_i the answer to prompt i, the loss is the mean over i of

        (cost_i - mean of the other costs) * log pi(y_i)

    Its gradient is that of the objective on average (REINFORCE with a baseline). Its value says
    nothing.
    """
    examples = list(zip(prompts, generate(policy, prompts)))
    answers = collate(examples, device_of(policy))
    logps = completion_logps(policy, *answers)  # (B,)
    with torch.no_grad():
        costs = kl_weight * (logps - completion_logps(reference, *answers)) - reward(examples)
        mean_of_others = (costs.sum() - costs) / max(1, len(costs) - 1)
    return ((costs - mean_of_others) * logps).mean()


# ---- where pairs come from -------------------------------------------------------------------
# Each source starts from pairs that the generator wrote, changes who writes which side, and returns
# pairs.


def offline_pairs(written, policy, reference, preferred_terms):
    """The usual choice: both sides are written beforehand, by the generator, and both are exact."""
    return written


def mistake_pairs(written, policy, reference, preferred_terms):
    """Chosen stays; rejected is what the policy writes now, if that is not a preferred answer.

    There are fewer and fewer pairs, down to none. Repeating the last few until they fill a batch
    would push them far too hard.
    """
    completions = generate(policy, [prompt for prompt, _, _ in written])
    return [
        (prompt, chosen, completion)
        for (prompt, chosen, _), completion in zip(written, completions)
        if not is_preferred(prompt + completion, preferred_terms)
    ]


def reference_pairs(written, policy, reference, preferred_terms):
    """The SFT model writes both sides; a judge tells which is the preferred one."""
    return judged(written, reference, preferred_terms)


def online_pairs(written, policy, reference, preferred_terms):
    """The policy as it is now writes both sides (arXiv 2402.04792), judged."""
    return judged(written, policy, preferred_terms)


def judged(written, model, preferred_terms):
    """Two completions of a model for each prompt: a pair where exactly one of them is preferred."""
    prompts = [prompt for prompt, _, _ in written]
    pairs = []
    for prompt, one, other in zip(prompts, generate(model, prompts), generate(model, prompts)):
        one_wins, other_wins = (is_preferred(prompt + x, preferred_terms) for x in (one, other))
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
    add("--batch-size", type=number(int, 1), default=128, help="prompts per step")
    add("--lr", type=number(float, 1e-9), default=1e-3, help="highest learning rate")
    add("--sft", default="runs/sft.pt", help="checkpoint to start from, and the reference")
    add("--preferred-terms", type=int, choices=TERM_COUNTS, default=DEFAULT_TERMS, help="wanted")
    add("--pairs", default="mistakes", help=f"{', '.join(SOURCES)}, or a file of JSON lines")
    add("--beta", type=number(float, 1e-9), default=0.8, help="scale of the pull to the reference")
    add("--loss", choices=LOSSES, default="sigmoid", help="imitation: -log pi(chosen) alone")
    add("--label-smoothing", type=number(float, 0, 0.499), default=0.0, help="share of bad labels")
    add("--nll-weight", type=number(float, 0), default=0.0, help="of -log pi(chosen) in the loss")
    add("--kl-weight", type=number(float, 0), default=0.0, help="of the KL on the policy's answers")
    add("--device", choices=DEVICES, default="cpu", help="where to compute")
    add("--out", default="runs/dpo.pt", help="checkpoint, with its log")
    args = parser.parse_args(argv)
    inputs = [args.sft] if args.pairs in SOURCES else [args.sft, args.pairs]
    if args.pairs in inputs and not os.path.isfile(args.pairs):
        parser.error(f"--pairs {args.pairs} is no file, and none of {', '.join(SOURCES)}")
    if os.path.realpath(args.out) in map(os.path.realpath, inputs):
        parser.error(f"--out {args.out} would replace the file of --sft or --pairs")
    if args.label_smoothing and args.loss != "sigmoid":
        parser.error("--label-smoothing works with --loss sigmoid only")
    return args


def look(policy, reference, preferred_terms, step):
    """Prints three of the policy's own answers; returns the metrics of many, with the KL in nats.

    The numbers of the pairs cannot show this: an answer that no pair contains may become likely.
    """
    max_sum = policy.config.max_sum
    generator = torch.Generator(device_of(policy)).manual_seed(LOOK_SEED)
    sums = [*range(MIN_SUM, max_sum + 1)] * LOOK_SAMPLES + shown_sums(max_sum)
    answers = answers_to(policy, sums, generator=generator)
    kl = logratios_of(policy, reference, answers).mean().item()
    shown = [f"{mark(answer, preferred_terms):<31}" for answer in answers[-3:]]
    tqdm.write(f"step {step:>4}  " + "  ".join(shown))
    return measure(answers, preferred_terms) | {"kl": kl}


def main(args):
    # ---- setup
    check_writable(args.out)
    torch.manual_seed(args.seed)  # for sampled completions
    rng = random.Random(args.seed)

    # ---- model: the SFT model twice, as the policy and as the frozen reference
    policy, _, _ = load_checkpoint(args.sft, args.device)
    reference, _, _ = load_checkpoint(args.sft, args.device)
    reference.requires_grad_(False)

    # ---- data: pairs, new in every step unless they come from a file
    max_sum, preferred_terms = policy.config.max_sum, args.preferred_terms
    sums, source = seen_sums(max_sum), SOURCES.get(args.pairs, offline_pairs)
    if args.pairs not in SOURCES:
        from_file = read_pairs(args.pairs, max_sum, preferred_terms)

    # ---- optimizer: AdamW for every weight
    optimizer = AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)

    # ---- the loop
    even_looks = {round(i * args.steps / EVEN_LOOKS) for i in range(EVEN_LOOKS + 1)}
    early_looks = {2**i for i in range(32) if 2**i < args.steps / EVEN_LOOKS}
    looks = even_looks | early_looks
    log = [{"step": 0, "own": look(policy, reference, preferred_terms, 0)}]
    for step in tqdm(range(1, args.steps + 1), desc="DPO"):
        # ---- learning rate
        optimizer.param_groups[0]["lr"] = learning_rate(args.lr, step, args.steps, DPO_FALL)

        # ---- batch
        if args.pairs in SOURCES:
            written = random_pairs(rng, args.batch_size, sums, preferred_terms)
        else:
            written = rng.choices(from_file, k=args.batch_size)
        pairs = source(written, policy, reference, preferred_terms)
        chosen = collate([(prompt, chosen) for prompt, chosen, _ in pairs], args.device)
        rejected = collate([(prompt, rejected) for prompt, _, rejected in pairs], args.device)

        # ---- loss: divided by the prompts of the step, so few mistakes have little weight
        policy_chosen_logps = completion_logps(policy, *chosen)
        policy_rejected_logps = completion_logps(policy, *rejected)
        with torch.no_grad():
            ref_chosen_logps = completion_logps(reference, *chosen)
            ref_rejected_logps = completion_logps(reference, *rejected)
        logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            *logps, args.beta, args.label_smoothing, args.loss == "ipo"
        )
        if args.loss == "imitation":
            losses = -policy_chosen_logps
        nll = -policy_chosen_logps.sum()
        loss = (losses.sum() + args.nll_weight * nll) / args.batch_size
        if args.kl_weight:
            prompts = [prompt for prompt, _, _ in written[::2]]  # half, to save time
            loss = loss + own_answers_loss(policy, reference, prompts, args.kl_weight)

        # ---- update, unless there was nothing to learn from
        loss.backward()
        if pairs or args.kl_weight:
            optimizer.step()
        optimizer.zero_grad()

        # ---- log
        record = {"step": step, "pairs": len(pairs)}
        if pairs:
            of_pairs = {
                "loss": losses,
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": chosen_rewards - rejected_rewards,
                "rewards/accuracies": (1 + (chosen_rewards - rejected_rewards).sign()) / 2,
                "logps/chosen": policy_chosen_logps,
                "logps/rejected": policy_rejected_logps,
            }
            record |= {name: values.mean().item() for name, values in of_pairs.items()}
        if step in looks:
            record["own"] = look(policy, reference, preferred_terms, step)
        log.append(record)

    # ---- save
    save_checkpoint(args.out, policy, vars(args) | {"reference": fingerprint(reference)}, log)
    first, last = log[0]["own"], log[-1]["own"]
    changes = [f"{key} {first[key]:.2f} -> {last[key]:.2f}" for key in ("exact", "preferred")]
    print(f"Wrote {args.out}: {', '.join(changes)}, KL {last['kl']:z.2f} nats.")
    if not any(record.get("pairs") for record in log):
        print("Warning: no step had a pair, so no preference was learned.")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
