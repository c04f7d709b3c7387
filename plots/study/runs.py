"""What the parts of the study share: the SFT models, what is measured, workers, kept results.

A part is a command such as `python -m plots.study.methods`. It runs one training per core, keeps
each result as soon as it has it, and writes one JSON when all are there. Started again, it goes on
where it stopped. A checkpoint is kept for the code of the scripts. A result is kept for the code of
its part and of all that the part imports. When that code changes, it is made anew.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import random
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from modulefinder import ModuleFinder
from pathlib import Path

import torch
from tqdm import tqdm

import evaluate
import train_dpo
import train_sft
from data import MIN_SUM, entropy_floor, is_preferred, random_equations
from data import run_script, seen_sums, write_file
from model import answer, load_checkpoint, logps_of, logratios_of
from plots.study import frontier
from train_sft import learning_rate

FOLDER = Path(__file__).parent
BETA, STEPS, BATCH = 0.8, 500, 128  # the defaults of train_dpo.py
SEEDS = (1, 2, 3, 4, 5)  # what the pages show; settings are chosen on seed 0
FEWER = SEEDS[:3]  # to save time
SAMPLES = 100  # answers to every sum; a fifth of them where only a setting is chosen


@functools.cache
def hash_of_code(file):
    """A hash of a file and all files of this project that it imports. Figures change no result."""
    finder = ModuleFinder([str(FOLDER.parent.parent)], excludes=["plots.figures"])
    finder.run_script(file)
    files = {module.__file__ for module in finder.modules.values()} - {None}
    code = b"".join(Path(path).read_bytes() for path in sorted(files))
    return hashlib.sha256(code).hexdigest()[:8]


RUNS = Path("runs/study", hash_of_code(train_dpo.__file__))


# ---- kept results ----------------------------------------------------------------------------


def name_of(task):
    """Of a file: ({"pairs": "offline", "lr": 0.001}, 2) gives "pairs=offline_lr=0.001_2"."""
    words = []
    for part in task:
        settings = part.items() if isinstance(part, dict) else ()
        words += [f"{flag}={value}" for flag, value in settings] or [str(part)]
    return "_".join(words)


def path_of(run, task):
    file = inspect.getfile(run)
    return RUNS / f"{Path(file).stem}-{hash_of_code(file)}" / f"{name_of(task)}.json"


def kept(run, *task):
    """The result of run(*task), from its file if it is there already."""
    path = path_of(run, task)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = run(*task)
        write_file(path, json.dumps(result, allow_nan=False).encode())
    return json.loads(path.read_text())


def trained(script, name, settings):
    """The path of what a script trains with these flags, unless it is there already."""
    path = RUNS / f"{name}.pt"
    if not path.exists():
        flags = [f"--{flag}={value}" for flag, value in settings.items()]
        with silence():
            script.main(script.parse_args([*flags, f"--out={path}"]))
    return path


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- one run ---------------------------------------------------------------------------------


def sft(seed):
    """Trains an SFT model. Returns the share of preferred answers that it gives to every sum."""
    reference, _, _ = load_checkpoint(trained(train_sft, f"sft_{seed}", {"seed": seed}))
    return frontier.preferred_shares(reference, 3).tolist()


def start(seed):
    """The SFT model of a seed twice, as policy and reference, and its shares p (sums,)."""
    p = torch.tensor(kept(sft, seed), dtype=torch.float64)
    policy, reference = (load_checkpoint(RUNS / f"sft_{seed}.pt")[0] for _ in range(2))
    return policy, reference, p


def adamw(policy, lr):
    """The optimizer of train_dpo.py."""
    betas = (0.9, 0.99)
    return torch.optim.AdamW(policy.parameters(), lr, betas=betas, weight_decay=0, fused=True)


def update(optimizers, loss, step, steps):
    """One step down the gradient of a loss, each optimizer at its own rate, as in train_dpo.py."""
    loss.backward()
    for optimizer in optimizers:
        highest = optimizer.defaults["lr"]
        optimizer.param_groups[0]["lr"] = learning_rate(highest, step, steps, train_dpo.FALL)
        optimizer.step()
        optimizer.zero_grad()


def look(policy, reference, step):
    """A point of the path of a policy: its own answers after a step."""
    with silence():
        return point_of({"step": step, "own": train_dpo.look(policy, reference, 3, step)})


def point_of(record):
    """What the study keeps of a record of a log."""
    point = {"step": record["step"], "pairs won": record.get("rewards/accuracies")}
    return point | {key: record["own"][key] for key in ("kl", "preferred", "exact")}


def gap_of(model, count, seed):
    """The gap of a model to the entropy floor, on equations drawn from a seed, in nats."""
    equations = random_equations(random.Random(seed), count, seen_sums())
    equations = ["".join(example) for example in equations]
    return -logps_of(model, equations).mean().item() - entropy_floor(equations)


def own_answers(policy, reference, seed):
    """Sampled answers to every sum, those to one sum side by side, and their log-ratios."""
    samples = SAMPLES if seed in SEEDS else SAMPLES // 5
    sums = [n for n in range(MIN_SUM, policy.config.max_sum + 1) for _ in range(samples)]
    sampled = answer(policy, sums, generator=torch.Generator().manual_seed(seed))
    return sampled, logratios_of(policy, reference, sampled).double()


def measured(policy, reference, p, seed):
    """What evaluate.py measures, with the parts of the KL."""
    sampled, logratios = own_answers(policy, reference, seed)
    preferred = torch.tensor([is_preferred(a, 3) for a in sampled])
    parts = frontier.split_kl(logratios.view(len(p), -1), preferred.view(len(p), -1), p)
    result = evaluate.result_of(policy, sampled, logratios, 3, seed)
    return result | {"seed": seed, "kl parts": parts}


# ---- many runs -------------------------------------------------------------------------------


def start_worker():
    """The main process alone hears Ctrl-C, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def gather(pool, title, run, tasks):
    """The kept results of run(*task), one per task: {name: [task, ...]} -> {name: [result, ...]}.

    The first task that fails is named.
    """
    futures = {
        name: [pool.submit(kept, run, *task) for task in of_name] for name, of_name in tasks.items()
    }
    task_of = dict(zip(sum(futures.values(), []), sum(tasks.values(), [])))
    for future in tqdm(as_completed(task_of), title, len(task_of)):
        if future.exception():
            task = name_of(task_of[future])
            raise RuntimeError(f"the run {task} failed") from future.exception()
    return {name: [future.result() for future in of_name] for name, of_name in futures.items()}


def write_part(name, study):
    """Writes the content that `study(pool)` makes of its runs, one per core, to <name>.json."""
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


def run_part(name, study, description):
    argparse.ArgumentParser(description=description.split("\n")[0]).parse_args()  # --help
    run_script(lambda: write_part(name, study))


def train_sft_models(pool, seeds):
    """Before all else, so that no two workers train the same one. Returns their shares p."""
    return gather(pool, "SFT", sft, {"p": [(seed,) for seed in seeds]})["p"]
