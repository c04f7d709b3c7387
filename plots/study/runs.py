"""What the parts of the study share: SFT models, rates, measurements, workers, kept results.

A part is a command such as `python -m plots.study.methods`. It runs one training per core, keeps
each result as soon as it has it, and writes one JSON when all are there. Started again, it goes on
where it stopped. A checkpoint is kept for the code of the scripts. A result is kept for the code of
its part and of all that the part imports. When that code changes, it is made anew; comments do not
count. A part imports this file and frontier.py, and no other part.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from modulefinder import ModuleFinder
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

import train_dpo
import train_sft
from data import held_out_sums, is_exact, is_preferred, measure, run_script, write_file
from evaluate import sampled_answers
from model import load_checkpoint
from plots.study import frontier
from train_sft import learning_rate

FOLDER = Path(__file__).parent
DEFAULTS = train_dpo.parse_args([])
BETA, STEPS, BATCH = DEFAULTS.beta, DEFAULTS.steps, DEFAULTS.batch_size
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of every row of every part
SEEDS = (1, 2, 3, 4, 5)  # what the pages show; rates are chosen on seed 0
FEWER = SEEDS[:3]  # to save time
SAMPLES = 100  # answers to every sum; a fifth of them on seed 0
PAIRS, PAIR_SEED = 2000, 1_000_003  # on which rewards and z are measured after training


@functools.cache
def hash_of_code(file):
    """A hash of a file and all files of this project that it imports. Figures change no result."""
    finder = ModuleFinder([str(FOLDER.parent.parent)], excludes=["plots.figures"])
    finder.run_script(file)
    files = {module.__file__ for module in finder.modules.values()} - {None}
    code = [ast.dump(ast.parse(Path(path).read_bytes())) for path in sorted(files)]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:8]


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


def trained_by_dpo(settings, seed):
    """The path of what train_dpo.py makes of the SFT model of a seed."""
    flags = {"seed": seed, "sft": trained_by_sft(seed)}
    return trained(train_dpo, name_of((settings, seed)), settings | flags)


def trained_by_sft(seed):
    return trained(train_sft, f"sft_{seed}", {"seed": seed})


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- one run ---------------------------------------------------------------------------------


def sft(seed):
    """Trains an SFT model. Returns the share of preferred answers that it gives to every sum."""
    reference, _, _ = load_checkpoint(trained_by_sft(seed))
    return frontier.preferred_shares(reference, 3).tolist()


def start(seed):
    """The SFT model of a seed twice, as policy and reference, and its shares p (sums,)."""
    p = torch.tensor(kept(sft, seed), dtype=torch.float64)
    policy, reference = (load_checkpoint(trained_by_sft(seed))[0] for _ in range(2))
    return policy, reference, p


def adamw(policy, lr):
    """The optimizer of train_dpo.py."""
    betas = (0.9, 0.99)
    return torch.optim.AdamW(policy.parameters(), lr, betas=betas, weight_decay=0, fused=True)


def update(optimizer, loss, step, steps):
    """One step down the gradient of a loss, at the rate of train_dpo.py."""
    loss.backward()
    highest = optimizer.defaults["lr"]
    optimizer.param_groups[0]["lr"] = learning_rate(highest, step, steps, train_dpo.DPO_FALL)
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


def own_answers(policy, reference, seed):
    """Sampled answers to every sum, and their log-ratios."""
    samples = SAMPLES if seed in SEEDS else SAMPLES // 5
    return sampled_answers(policy, reference, samples, seed)


def measured(policy, reference, p, seed):
    """What the policy answers, and the parts of its KL from the reference."""
    answers, logratios = own_answers(policy, reference, seed)
    preferred = torch.tensor([is_preferred(answer, 3) for answer in answers])
    parts = frontier.split_kl(logratios.view(len(p), -1), preferred.view(len(p), -1), p)
    prompts = tuple(f"{n}=" for n in held_out_sums(policy.config.max_sum))
    held_out = [is_exact(answer) for answer in answers if answer.startswith(prompts)]
    result = {"seed": seed, "sampled": measure(answers, 3), "held out": fmean(held_out)}
    return result | {"kl": logratios.mean().item(), "kl parts": parts}


def wrong_sum(rng, completion):
    """One term changed by 1, 2, 3 or 10, and still positive: "10+30+3" -> "10+28+3"."""
    terms = [int(term) for term in completion.split("+")]
    i, change = rng.randrange(len(terms)), rng.choice((-10, -3, -2, -1, 1, 2, 3, 10))
    terms[i] += change if terms[i] + change > 0 else -change
    return "+".join(map(str, terms))


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


def at_best_rate(pool, run, rows, seeds):
    """Every row at every rate on seed 0, and over seeds at the rate with the most preferred.

    {name: settings} -> {name: its settings with the best lr; what was tried, as lists [lr, share of
    preferred answers, share of exact ones]; and its results over seeds}
    """
    tasks = {name: [(row | {"lr": lr}, 0) for lr in RATES] for name, row in rows.items()}
    tried = {}
    for name, results in gather(pool, "rates", run, tasks).items():
        shares = [(r["sampled"]["preferred"], r["sampled"]["exact"]) for r in results]
        tried[name] = [[lr, *of_rate] for lr, of_rate in zip(RATES, shares)]
    best = {name: max(tried[name], key=itemgetter(1))[0] for name in rows}
    settings = {name: row | {"lr": best[name]} for name, row in rows.items()}
    tasks = {name: [(settings[name], seed) for seed in seeds] for name in rows}
    results = gather(pool, "seeds", run, tasks)
    return {
        name: {"settings": settings[name], "tried": tried[name], "results": results[name]}
        for name in rows
    }


def train_sft_models(pool, seeds):
    """Before all else, so that no two workers train the same one. Returns their shares p."""
    return gather(pool, "SFT", sft, {"p": [(seed,) for seed in seeds]})["p"]


def write_part(name, make_content):
    """Writes what `make_content(pool)` returns, with one run per core, to <name>.json."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    workers = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(torch.get_num_threads(), workers, start_worker)
    try:
        content = make_content(pool)
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    write_file(FOLDER / f"{name}.json", json.dumps(content, allow_nan=False).encode())
    print(f"Wrote {name}.json; make publish writes the page from it.")


def run_part(name, make_content):
    """The command line of a part, which knows no flag but --help."""
    argparse.ArgumentParser(description=f"Trains and writes {name}.json.").parse_args()
    run_script(lambda: write_part(name, make_content))
