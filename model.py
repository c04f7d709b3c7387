"""A decoder-only Transformer from scratch: log-probabilities, generation, checkpoints.

    from model import generate, load_checkpoint
    model, args = load_checkpoint("runs/sft.pt")
    tokens, completion_mask = generate(model, ["43=", "100="])

Symbols, here and in the other files:
    B  sequences in a batch          V  vocabulary size
    T  columns, padding included     H  attention heads
    C  width of the residual stream  D  width of a head, C / H
    M  distinct prefixes in a batch  U  cells of its grid (B, T) that hold a token
Left out on purpose: dropout (every batch is fresh, nothing can be overfitted), biases in the
linear layers, anything for texts longer than one equation.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import hashlib
import io
import json
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import CHARACTERS, DEFAULT_MAX_SUM, END, PAD, PROMPT_WIDTH, VOCAB_SIZE, InputError
from data import collate, longest_completion


@dataclasses.dataclass
class GPTConfig:
    depth: int = 6
    width: int = 48
    heads: int = 4
    max_sum: int = DEFAULT_MAX_SUM  # the largest sum of the task it is trained on
    vocabulary: str = CHARACTERS

    @property
    def block_size(self):
        """Columns the model has: room for the longest equation and one stray term beyond it."""
        return PROMPT_WIDTH + longest_completion(self.max_sum) + len(f"+{self.max_sum}") + 1


class Packing:
    """The M distinct prefixes of a batch, a row each. Only attention needs their grid (B, T) back.

    A causal model has the same values wherever the tokens up to there are the same. So prompts and
    first digits that equations share are computed once, and padding never: a forward and backward
    pass takes six tenths of the time of one over every cell of the grid.
    "9=4+5", "9=3+6" -> 8 rows for 10 tokens, as "9" and "9=" are shared
    """

    def __init__(self, tokens, heads, past=0):
        """tokens (B, T). After `past` columns, which are not seen here, every prefix is its own."""
        B, T = self.shape = tokens.shape
        cells = torch.arange(B * T, device=tokens.device)
        prefixes = cells.view(B, T).clone()  # a number for each, equal where they are
        if past == 0:
            # Up to 16 tokens as one number, exact in 64 bits; longer prefixes are seldom equal.
            powers = (PAD + 2) ** torch.arange(min(T, 16), device=tokens.device)
            prefixes[:, :16] = -((tokens[:, :16] + 1) * powers).cumsum(1)
        used = (tokens != PAD).flatten()
        cells = cells[used]  # (U,) that hold a token
        distinct, self.source = prefixes.flatten()[used].unique(return_inverse=True)  # (M,), (U,)
        first = cells.new_empty(len(distinct)).scatter_(0, self.source, cells)  # any of the equal
        starts = B * T * torch.arange(3 * heads, device=tokens.device)  # of grids (3H, B, T)
        self.cells = cells[:, None] + starts  # (U, 3H)
        self.first = first[:, None] + starts[:heads]  # (M, H)

    def unpack(self, x, heads):
        """(M, heads * D) -> (heads, B, T, D), zero where there is no token"""
        (B, T), D = self.shape, x.shape[1] // heads
        rows = x.index_select(0, self.source).view(-1, D)  # (U * heads, D)
        grid = x.new_zeros(heads * B * T, D)
        grid.index_copy_(0, self.cells[:, :heads].flatten(), rows)
        return grid.view(heads, B, T, D)

    def pack(self, grid):
        """(H, B, T, D) -> (M, H * D)"""
        H, D = grid.shape[0], grid.shape[3]
        rows = grid.flatten(0, 2).index_select(0, self.first.flatten())  # (M * H, D)
        return rows.view(-1, H * D)


class Attention(nn.Module):
    """Causal multi-head self-attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        later = torch.full((config.block_size, config.block_size), -torch.inf).tril(-1)
        self.register_buffer("later", later, persistent=False)

    def forward(self, x, packing, cache=None):
        """x (M, C), packed -> (M, C).

        Padding at the left of a prompt has no key and no value but zero, so a part of attention
        can go to nothing. Every prompt has some; else `100=` would be the one without.
        `cache`, for generation, is a dict: of each layer, the keys and values of the columns before
        x as one tensor, to which those of x are added.
        """
        qkv = packing.unpack(self.qkv(x), 3 * self.heads)
        q, k, v = qkv.chunk(3)  # each (H, B, T, D)
        if cache is not None:
            new = qkv[self.heads :]  # (2H, B, T, D)
            cache[self] = torch.cat([cache[self], new], dim=2) if self in cache else new
            k, v = cache[self].chunk(2)  # each (H, B, S, D)
        (T, D), S = q.shape[2:], k.shape[2]
        # Plain products: F.scaled_dot_product_attention is slower at these lengths, and so is
        # a softmax over the last axis; so keys come first.
        scores = k @ q.mT * D**-0.5 + self.later[:S, S - T : S]  # (H, B, S, T)
        y = scores.softmax(2).mT @ v  # (H, B, T, D)
        return self.out(packing.pack(y))


class MLP(nn.Module):
    """Two layers with a squared ReLU between (arXiv 2109.08668)."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(config.width, 4 * config.width, bias=False)
        self.out = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x):
        return self.out(F.relu(self.inner(x)).square())


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, packing, cache=None):
        x = x + self.attention(self.norm1(x), packing, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(VOCAB_SIZE, config.width)
        self.position_embedding = nn.Embedding(config.block_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCAB_SIZE, bias=False)

        nn.init.normal_(self.token_embedding.weight, std=0.2)
        nn.init.normal_(self.position_embedding.weight, std=0.2)
        nn.init.zeros_(self.head.weight)  # the first loss is that of a uniform guess
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.out.weight)

    def forward(self, tokens, cache=None):
        """tokens (B, T) -> logits (B, T, V) for the token after each, zero at PAD.

        `cache`: a dict, empty at first, see `generate`; `tokens` then are the next columns.
        """
        past = next(iter(cache.values())).shape[2] if cache else 0
        packing = Packing(tokens, self.config.heads, past)
        cells = packing.first[:, 0]
        x = self.token_embedding(tokens.flatten()[cells])  # (M, C)
        x = x + self.position_embedding(past + cells % tokens.shape[1])
        for block in self.blocks:
            x = block(x, packing, cache)
        return packing.unpack(self.head(self.norm(x)), 1)[0]


def token_logps(model, tokens, completion_mask):
    """Log-probability of each completion token given those before it, in nats: (B, T - 1).

    tokens (B, T), completion_mask (B, T); column t is for token t + 1. Zero off the completion.
    """
    targets, mask = tokens[:, 1:], completion_mask[:, 1:]  # (B, T - 1)
    needed = mask.flip(1).cumsum(1).flip(1) > 0  # the inputs that a completion token comes after
    logits = model(tokens[:, :-1].where(needed, PAD))  # (B, T - 1, V)
    logps = -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return logps * mask


def completion_logps(model, tokens, completion_mask):
    """Summed log-probability of each completion, log pi(y|x) in nats: (B,)."""
    return token_logps(model, tokens, completion_mask).sum(1)


@torch.no_grad()
def generate(model, prompts, greedy=False, generator=None):
    """Completions of `prompts` (strings): tokens (B, T) and completion mask (B, T).

    Greedy, or sampled at temperature 1 with a torch `generator` of the model's device. The batch
    grows by a column at a time. A row that ended is dropped from it; one that has not ended when
    the model's columns are used up stays without an end token.
    """
    device, T = model.head.weight.device, model.config.block_size
    tokens = torch.full((len(prompts), T), PAD, device=device)
    tokens[:, :PROMPT_WIDTH] = collate([(prompt, "") for prompt in prompts])[0][:, :PROMPT_WIDTH]
    lengths = torch.full((len(prompts),), T, device=device)

    rows = torch.arange(len(prompts), device=device)  # those still growing
    cache = {}
    new = tokens[:, :PROMPT_WIDTH]
    for t in range(PROMPT_WIDTH, T):
        logits = model(new, cache=cache)[:, -1]  # (rows, V)
        if greedy:
            drawn = logits.argmax(1)
        else:
            # A diverged model still answers, with noise.
            probabilities = logits.softmax(1).nan_to_num(1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        tokens[rows, t] = drawn
        going = (drawn != END).nonzero()[:, 0]
        if len(going) < len(rows):
            lengths[rows[drawn == END]] = t + 1
            rows, drawn = rows[going], drawn[going]
            cache = {layer: kept.index_select(1, going) for layer, kept in cache.items()}
        if len(rows) == 0:
            break
        new = drawn[:, None]

    columns = torch.arange(max(lengths.tolist(), default=PROMPT_WIDTH), device=device)
    mask = (columns >= PROMPT_WIDTH) & (columns < lengths[:, None])
    return tokens[:, : len(columns)], mask


# ---- checkpoints -----------------------------------------------------------------------------


def save_checkpoint(file, model, args):
    """Writes {"config", "model", "args"}, all of plain types, to a binary `file`."""
    checkpoint = {
        "config": dataclasses.asdict(model.config),
        "model": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
        "args": dict(args),
    }
    buffer = io.BytesIO()  # a full disk is then an OSError of `write`, not one of torch's own
    torch.save(checkpoint, buffer)
    file.write(buffer.getbuffer())


def load_checkpoint(path, device="cpu"):
    """The model, in evaluation mode, and the args that a checkpoint of `save_checkpoint` holds.

    Raises InputError where there is no such file or it is not such a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"there is no checkpoint {path}; train_sft.py and train_dpo.py write them"
        ) from None
    except Exception as error:  # torch.load has no one type for what is no checkpoint
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a checkpoint, or is cut short: {reason}") from None
    try:
        config = GPTConfig(**checkpoint["config"])
        if config.vocabulary != CHARACTERS or config.width % config.heads:
            raise ValueError
        model = GPT(config)
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), dict(checkpoint["args"])
    except (TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RuntimeError):
        raise InputError(
            f"{path} is not of this version of model.py; train_sft.py writes one that is"
        ) from None


def fingerprint(model):
    """A hash of the weights, by which a checkpoint names its reference."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()


def log_path(checkpoint_path):
    """runs/sft.pt -> runs/sft.jsonl"""
    return os.path.splitext(checkpoint_path)[0] + ".jsonl"


def write_record(log, record):
    """Adds a line of JSON to a log, a binary file."""
    log.write(json.dumps(record).encode() + b"\n")


# ---- devices and processes -------------------------------------------------------------------

with contextlib.suppress(OSError, AttributeError, TypeError):  # Linux alone has this library
    # Keep what a step frees for the next one (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h):
    # else each large tensor is asked of the system anew, which takes a tenth of a step.
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-1, 2**30)
    libc.mallopt(-3, 2**25)


def find_device(name):
    """The torch device of that name, or InputError if this machine has none.

    Under torchrun "cuda" is the GPU of this process.
    """
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1).to(name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(
            f"--device {name} is not there; cpu always is, cuda where torch finds a GPU"
        ) from None


def join_processes(device):
    """(rank, world size) of this process, joined with the others if torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def add_up(tensors):
    """Replaces each tensor by its sum over all processes; with one process, leaves them."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        try:
            dist.all_reduce(flat)
        except RuntimeError:
            raise InputError("another process of this run has stopped") from None
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))
