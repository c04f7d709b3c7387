"""The exact frontier: what the best policy would pay in KL for its share of preferred answers.

Let p_N be the share of preferred answers that the reference gives to N. With reward r for them and
0 for all others, the optimal policy (arXiv 2305.18290, eq. 4) multiplies their odds by
t = exp(r / beta) and changes nothing else. Over t, the points (share, KL) are the frontier: no
policy has a larger share of preferred answers at the same KL.
"""

import itertools
import math

import torch

from data import MIN_SUM
from model import logps_of


def preferred_shares(reference, terms):
    """p_N for N = 5, 6, ...: (sums,), by enumeration of all preferred answers."""
    sums = range(MIN_SUM, reference.config.max_sum + 1)
    equations = []
    for n in sums:
        for cuts in itertools.combinations(range(1, n), terms - 1):
            sizes = (str(end - start) for start, end in zip((0, *cuts), (*cuts, n)))
            equations.append(f"{n}=" + "+".join(sizes))
    probabilities = logps_of(reference, equations).double().exp()
    numbers = [math.comb(n - 1, terms - 1) for n in sums]
    return torch.stack([part.sum() for part in probabilities.split(numbers)]).clamp(max=1 - 1e-6)


def optimal_policy(p, log_t):
    """Mean share and KL in nats of the optimum whose odds of p (sums,) are multiplied by t."""
    odds = p.logit() + log_t
    normalizer = torch.logaddexp(p.log() + log_t, (-p).log1p())  # log(p t + 1 - p)
    return odds.sigmoid().mean().item(), (odds.sigmoid() * log_t - normalizer).mean().item()


def frontier_kl(p, share):
    """The KL of the frontier at a mean share, by bisection; 0 up to what the reference has."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if optimal_policy(p, middle)[0] < share else (low, middle)
    return optimal_policy(p, low)[1]


def best_of_n(p, n):
    """Mean share and KL in nats of the best of n answers of the reference."""
    share = 1 - (1 - p) ** n
    return share.mean().item(), bernoulli_kl(share, p).mean().item()


def bernoulli_kl(s, p):
    """KL of two Bernoulli variables of probability s and p, elementwise."""
    return torch.xlogy(s, s / p) + torch.xlogy(1 - s, (1 - s) / (1 - p))


def split_kl(logratios, preferred, p):
    """The parts of the KL from the reference that the preference does not need, in nats.

    `logratios`, log pi - log pi_ref, and `preferred` are (sums, samples) of the policy's own
    answers; p (sums,). With E the preferred answers and s their share,
        KL = kl(s || p) + s KL(pi_E || ref_E) + (1 - s) KL(pi_notE || ref_notE)
    is what the preference needs, drift among preferred answers, and drift among all others. A
    sampled s makes s log s too large by (1 - s) / 2n to first order, which is taken off. The excess
    is the KL minus that of the frontier at the same share.
    """
    logratios, preferred = logratios.double(), preferred.double()
    s, n = preferred.mean(1), preferred.shape[1]
    bias = torch.where((s > 0) & (s < 1), 0.5 / n, 0.0)
    drift = (logratios * preferred).mean(1) - torch.xlogy(s, s / p) + bias * (1 - s)
    other = (logratios * (1 - preferred)).mean(1) - torch.xlogy(1 - s, (1 - s) / (1 - p)) + bias * s
    share = s.mean().clamp(max=1 - 0.5 / preferred.numel()).item()
    return {
        "preferred": drift.mean().item(),
        "others": other.mean().item(),
        "excess": logratios.mean().item() - frontier_kl(p, share),
    }


def optimum_with_kl(p, kl_weight, beta):
    """Mean share and KL in nats where DPO with the KL on the policy's own answers has its optimum.

    It is sought on the frontier, where z = log t for every pair of a preferred answer and another:
    the least of -log sigmoid(beta log t) + kl_weight KL(t), by a grid that closes in on it.
    """

    def loss(log_t):
        return math.log1p(math.exp(-beta * log_t)) + kl_weight * optimal_policy(p, log_t)[1]

    best, step = 0.0, 0.2
    for _ in range(6):
        best = min((max(0.0, best + i * step) for i in range(-100, 101)), key=loss)
        step /= 20
    return optimal_policy(p, best)
