"""A decoder-only Transformer from scratch: log-probabilities, generation, checkpoints.

    from model import generate, load_checkpoint
    model, args = load_checkpoint("runs/sft.pt")
    print(generate(model, ["43=", "100="]))

Symbols, here and in the other files:
    B  sequences in a batch          H  attention heads
    T  columns, padding included     C  width of the residual stream
    S  columns that attention sees   D  width of a head, C / H
    V  vocabulary size               U  cells of the grid (B, T) that hold a token, row by row
We left out dropout (every batch is fresh, so nothing can be overfitted), biases in the linear
layers, and anything for texts longer than one equation.
"""

import dataclasses
import hashlib
import io
import json

import torch
import torch.nn.functional as F
from torch import nn

from data import CUT_OFF, DEFAULT_MAX_SUM, END, EQUALS, PAD, VOCAB_SIZE, InputError
from data import atomic_write, collate, decode, log_path, longest_completion

PROMPT_WIDTH = 4  # positions of a prompt: three digits and the equals sign


@dataclasses.dataclass
class GPTConfig:
    depth: int = 6
    width: int = 48
    heads: int = 4
    max_sum: int = DEFAULT_MAX_SUM

    @property
    def block_size(self):
        """Positions: those of a prompt, of the longest completion, one stray term and the end."""
        return PROMPT_WIDTH + longest_completion(self.max_sum) + len(f"+{self.max_sum}") + 1


class Attention(nn.Module):
    """Causal multi-head self-attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        causal_mask = torch.full([config.block_size] * 2, -torch.inf).triu(1)
        self.register_buffer("causal_mask", causal_mask, persistent=False)

    def forward(self, x, used, shape, past=None):
        """x (U, C), the cells `used` (U,) of a grid of `shape` (B, T) -> (U, C), keys and values.

        Padding comes after all tokens of its row, so the causal mask hides it from them. `past` are
        the keys and values, (B, H, S - T, D) each, of the columns before these.
        """
        (B, T), C, H = shape, x.shape[1], self.heads
        grid = x.new_zeros(B * T, 3 * C).index_copy(0, used, self.qkv(x))  # (B * T, 3C)
        q, k, v = grid.view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, H, S, D)
        S = k.shape[2]
        scores = q @ k.mT * (C // H) ** -0.5 + self.causal_mask[S - T : S, :S]  # (B, H, T, S)
        y = scores.softmax(-1) @ v  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B * T, C).index_select(0, used)  # (U, C)
        return self.out(y), (k, v)


class MLP(nn.Module):
    """The product of two linear maps, and a third one (bilinear, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(config.width, 2 * (8 * config.width // 3), bias=False)
        self.out = nn.Linear(8 * config.width // 3, config.width, bias=False)

    def forward(self, x):
        left, right = self.inner(x).chunk(2, dim=-1)
        return self.out(left * right)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, used, shape, past=None):
        y, kv = self.attention(self.norm1(x), used, shape, past)
        x = x + y
        return x + self.mlp(self.norm2(x)), kv


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

    def forward(self, tokens, positions=None, cache=None):
        """tokens (B, T) -> logits (B, T, V) for the token after each, zero at padding.

        In generation `tokens` are the next columns, `positions` (B, T) are theirs, and `cache` is a
        list with an entry a block, at first None: the keys and values of earlier columns.
        """
        positions = positions_of(tokens) if positions is None else positions
        cache = cache or [None] * len(self.blocks)
        used = (tokens != PAD).flatten().nonzero()[:, 0]  # (U,): padding never enters the blocks
        x = self.token_embedding(tokens.flatten()[used])  # (U, C)
        x = x + self.position_embedding(positions.flatten()[used])
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, used, tokens.shape, cache[i])
        logits = self.head(self.norm(x))  # (U, V)
        grid = logits.new_zeros(tokens.numel(), VOCAB_SIZE).index_copy(0, used, logits)
        return grid.view(*tokens.shape, VOCAB_SIZE)


def positions_of(tokens):
    """(B, T) -> (B, T): distances from the first equals sign, whose own position is 3."""
    equals = (tokens == EQUALS).int().argmax(1, keepdim=True)  # (B, 1), the first if several
    return torch.arange(tokens.shape[1], device=tokens.device) - equals + PROMPT_WIDTH - 1


def completion_logps(model, tokens, completion_mask):
    """log pi(y|x), summed over each completion, in nats: tokens and mask (B, T) -> (B,)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T - 1)
    inputs = inputs.masked_fill(targets == PAD, PAD)  # nothing comes after the last token
    targets = targets.masked_fill(~completion_mask[:, 1:], PAD)
    logits = model(inputs).flatten(0, 1)  # (B * (T - 1), V)
    nats = F.cross_entropy(logits, targets.flatten(), ignore_index=PAD, reduction="none")
    return -nats.view_as(targets).sum(1)  # (B,)


@torch.no_grad()
def generate(model, prompts, greedy=False, generator=None):
    """Completions (strings) of `prompts`; one that the model did not end closes with an ellipsis.

    Greedy, or sampled at temperature 1 with a torch `generator`. The batch grows by a column at a
    time: first by the prompt's characters, then by the answer's. Rows that have ended leave it.
    """
    device, longest = model.head.weight.device, model.config.block_size - PROMPT_WIDTH
    tokens, _ = collate([(prompt, CUT_OFF) for prompt in prompts])
    tokens = F.pad(tokens.to(device), (0, longest), value=PAD)  # (B, T)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    alive = torch.arange(len(prompts), device=device)  # (A,) rows that still grow
    positions, cache, done = positions_of(tokens), [None] * len(model.blocks), 0
    for t in range(min(map(len, prompts), default=0), tokens.shape[1]):
        if len(alive) == 0:
            break
        logits = model(tokens[alive, done:t], positions[alive, done:t], cache)[:, -1]  # (A, V)
        done = t
        if greedy:
            drawn = logits.argmax(1)
        else:  # a diverged model answers with noise
            drawn = torch.multinomial(logits.softmax(1).nan_to_num(1), 1, generator=generator)[:, 0]
        tokens[alive, t] = drawn = drawn.where(t >= starts[alive], tokens[alive, t])
        growing = ((drawn != END) & (t + 1 < starts[alive] + longest)).nonzero()[:, 0]
        alive = alive[growing]
        cache = [(k[growing], v[growing]) for k, v in cache]
    return [decode(row[len(prompt) :]) for row, prompt in zip(tokens.tolist(), prompts)]


def save_checkpoint(path, model, args, log):
    """Writes {"config", "model", "args"}, of plain types, and its log beside it, as JSON lines."""
    buffer, config = io.BytesIO(), dataclasses.asdict(model.config)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.save({"config": config, "model": weights, "args": args}, buffer)
    atomic_write(log_path(path), "".join(json.dumps(line) + "\n" for line in log).encode())
    atomic_write(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """The model, in evaluation mode, and the args that save_checkpoint wrote; else InputError."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), dict(checkpoint["args"])
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}; train_sft.py writes the first") from None
    except Exception as error:  # torch.load has no one type for what is no checkpoint
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a checkpoint of this version: {reason}") from None


def fingerprint(model):
    """A hash of the weights, by which a checkpoint names its reference."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()
