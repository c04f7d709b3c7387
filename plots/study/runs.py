"""What the parts of the study share: the SFT models, what is measured, workers, kept results.

A part is a command such as `python -m plots.study.methods`. It runs one training a core, keeps each
result as soon as it has it, and writes one JSON when all are there; started again, it goes on where
it stopped. Results are kept for this code only: a change of the scripts trains anew.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import data
import evaluate
import model
import train_dpo
import train_sft
from data import MIN_SUM, entropy_floor, is_preferred, parse, random_equations
from data import run_script, seen_sums, write_file
from model import answer, load_checkpoint, logps_of, logratios_of
from plots.study import frontier
from train_sft import learning_rate

FOLDER = Path(__file__).parent
SAMPLES = 100  # answers to every sum; a fifth of them where only a rate is chosen


def hash_of(*modules):
    code = b"".join(Path(module.__file__).read_bytes() for module in modules)
    return hashlib.sha256(code).hexdigest()[:8]


RUNS = Path("runs/study", hash_of(data, model, train_sft, train_dpo))


# ---- one run ---------------------------------------------------------------------------------


def kept(name, compute):
    """The result of compute(), from its file if it is there already."""
    path = RUNS / f"{name}.json"
    if not path.exists():
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(result, allow_nan=False).encode())
    return json.loads(path.read_text())


@contextlib.contextmanager
def silence():
    with open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def trained(script, name, settings):
    """The path of what a script trains with these flags, unless it is there already."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        flags = [f"--{flag}={value}" for flag, value in settings.items()]
        with silence():
            script.main(script.parse_args([*flags, f"--out={path}"]))
    return path


def name_of(settings, seed):
    """Of files: {"pairs": "offline", "lr": 0.001} and seed 2 give "pairs=offline_lr=0.001_2"."""
    return "_".join([*(f"{flag}={value}" for flag, value in settings.items()), str(seed)])


def sft(seed):
    """Trains an SFT model, and keeps the share of preferred answers that it gives to every sum."""

    def compute():
        reference, _, _ = load_checkpoint(trained(train_sft, f"sft_{seed}", {"seed": seed}))
        return {"p": frontier.preferred_shares(reference, 3).tolist()}

    return kept(f"sft_{seed}", compute)


def start(seed):
    """The SFT model of a seed twice, as policy and reference, and its shares p (sums,)."""
    policy, reference = (load_checkpoint(RUNS / f"sft_{seed}.pt")[0] for _ in range(2))
    return policy, reference, torch.tensor(sft(seed)["p"], dtype=torch.float64)


def train(optimizers, lr, steps, next_loss, after_step=lambda step: None):
    """The loop of the scripts for what they cannot do: next_loss() draws a batch for a step."""
    for step in range(1, steps + 1):
        next_loss().backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(lr, step, steps)
            optimizer.step()
            optimizer.zero_grad()
        after_step(step)


def adamw(policy):
    """The optimizer of train_dpo.py."""
    return [torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0, fused=True)]


def look(policy, reference, step):
    """A point of the path of a policy: its own answers after a step."""
    with silence():
        own = train_dpo.look(policy, reference, 3, step)
    return {"step": step} | {key: own[key] for key in ("kl", "preferred", "exact")}


def gap_of(model, count, seed):
    """The gap of a model to the entropy floor, on equations drawn from a seed, in nats."""
    equations = random_equations(random.Random(seed), count, seen_sums())
    equations = ["".join(example) for example in equations]
    return -logps_of(model, equations).mean().item() - entropy_floor(equations)


def sampled_answers(model, samples, generator):
    """So many answers to every sum, those to one sum side by side."""
    sums = range(MIN_SUM, model.config.max_sum + 1)
    return answer(model, [n for n in sums for _ in range(samples)], generator=generator)


def measured(policy, reference, p, seed, samples=SAMPLES):
    """What evaluate.py measures, with the parts of the KL."""
    sampled = sampled_answers(policy, samples, torch.Generator().manual_seed(seed))
    logratios = logratios_of(policy, reference, sampled).double()
    preferred = torch.tensor([is_preferred(a, 3) for a in sampled])
    parts = frontier.split_kl(logratios.view(-1, samples), preferred.view(-1, samples), p)
    result = evaluate.evaluate(policy, sampled, logratios, 3, seed)
    return result | {"seed": seed, "kl parts": parts, "wrong": ways_to_miss(sampled)}


def ways_to_miss(answers):
    """Shares of the answers that parse and have a wrong sum, by how they miss the right one."""
    ways = {"go on after the exact sum": 0, "overshoot": 0, "stop short": 0}
    for n, terms in filter(None, map(parse, answers)):
        sums = list(itertools.accumulate(terms))
        if sums[-1] != n:
            missed = "overshoot" if sums[-1] > n else "stop short"
            ways["go on after the exact sum" if n in sums else missed] += 1
    total = sum(ways.values())
    return {way: count / total for way, count in ways.items()} if total else ways


# ---- many runs -------------------------------------------------------------------------------


def start_worker():
    """The main process alone hears Ctrl-C, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def gather(title, futures):
    """The results of {name: future}, as {name: result}; the first that fails is named."""
    names = {future: name for name, future in futures.items()}
    for future in tqdm(as_completed(names), title, len(names)):
        if future.exception():
            raise RuntimeError(f"the run {names[future]!r} failed") from future.exception()
    return {name: future.result() for name, future in futures.items()}


def write_part(name, study):
    """Writes the content that `study(pool)` makes of its runs, one a core, to <name>.json."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workers = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(torch.get_num_threads(), workers, start_worker)
    try:
        content = study(pool)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    write_file(FOLDER / f"{name}.json", json.dumps(content, allow_nan=False).encode())
    print(f"Wrote {name}.json; make publish writes the page from it.")


def run_part(name, study):
    run_script(lambda: write_part(name, study))


def train_sft_models(pool, seeds):
    """Before all else, so that no two workers train the same one."""
    gather("SFT", {f"sft_{seed}": pool.submit(sft, seed) for seed in seeds})
