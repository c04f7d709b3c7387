"""A decoder-only Transformer from scratch: log-probabilities, generation, checkpoints.

    from model import generate, load_checkpoint
    model, args, log = load_checkpoint("runs/sft.pt")
    print(generate(model, ["43=", "100="]))

Symbols, here and in the other files:
    B  sequences in a batch          H  attention heads
    T  columns                       C  width of the residual stream
    S  columns that attention sees   D  width of a head, C / H
    V  vocabulary size
We left out dropout: SFT draws fresh equations for every step, so it cannot overfit.
"""

import dataclasses
import hashlib
import io

import torch
from torch import nn

from data import (CUT_OFF, DEFAULT_MAX_SUM, END, PROMPT_WIDTH, VOCAB_SIZE, InputError, collate,
                  decode, longest_completion, write_file)  # fmt: skip

CHUNK = 1000  # answers that are written or scored at a time


@dataclasses.dataclass
class GPTConfig:
    depth: int = 6
    width: int = 48
    heads: int = 4
    max_sum: int = DEFAULT_MAX_SUM

    @property
    def block_size(self):
        """Columns: those of a prompt, of the longest completion, one stray term and the end."""
        return PROMPT_WIDTH + longest_completion(self.max_sum) + len(f"+{self.max_sum}") + 1


class Attention(nn.Module):
    """Causal multi-head self-attention (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, past=None):
        """x (B, T, C) -> (B, T, C), and the keys and values of `past` and x, (B, H, S, D) each."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, H, S, D)
        S, D = k.shape[2:]
        causal_mask = torch.full((T, S), -torch.inf, device=x.device).triu(S - T + 1)
        scores = q @ k.mT * D**-0.5 + causal_mask  # (B, H, T, S)
        y = scores.softmax(-1) @ v  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C)), (k, v)


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

    def forward(self, x, past=None):
        y, keys_and_values = self.attention(self.norm1(x), past)
        x = x + y
        return x + self.mlp(self.norm2(x)), keys_and_values


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
        """tokens (B, T) -> logits (B, T, V) for the token after each.

        In generation `tokens` are the next columns, and `cache` is a list with one entry per block:
        the keys and values of the columns before them, or None at first. It is updated in place.
        """
        cache = cache or [None] * len(self.blocks)
        start = cache[0][0].shape[2] if cache[0] else 0
        x = self.token_embedding(tokens)  # (B, T, C)
        x = x + self.position_embedding.weight[start : start + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x, cache[i] = block(x, cache[i])
        return self.head(self.norm(x))


def device_of(model):
    return next(model.parameters()).device


def completion_logps(model, tokens, completion_mask):
    """log pi(y|x), summed over each completion, in nats: tokens and mask (B, T) -> (B,)."""
    logps = model(tokens[:, :-1]).log_softmax(-1)  # (B, T - 1, V)
    logps = logps.gather(2, tokens[:, 1:, None])[:, :, 0]  # (B, T - 1), of the tokens that came
    return (logps * completion_mask[:, 1:]).sum(1)  # (B,)


@torch.no_grad()
def generate(model, prompts, greedy=False, generator=None):
    """Completions (strings) of `prompts`; one that the model did not end closes with an ellipsis.

    Greedy, or sampled at temperature 1 with a torch `generator`. A ValueError says which prompt
    does not fit. A row that has ended goes on with tokens that nobody reads.
    """
    cache = [None] * len(model.blocks)
    # A prompt alone is an example whose completion was cut off before its first token.
    examples = [(prompt, CUT_OFF) for prompt in prompts]
    new, _ = collate(examples, device_of(model))  # (B, 4), not yet read
    written = new[:, :0]  # (B, 0)
    for _ in range(model.config.block_size - PROMPT_WIDTH):
        logits = model(new, cache)[:, -1]  # (B, V)
        if greedy:
            new = logits.argmax(1, keepdim=True)  # (B, 1)
        else:  # a model that has diverged writes noise
            new = torch.multinomial(logits.softmax(1).nan_to_num(1), 1, generator=generator)
        written = torch.cat([written, new], dim=1)
        if (written == END).any(1).all():
            break
    return [decode(row) for row in written.tolist()]


def answers_to(model, sums, greedy=False, generator=None):
    """An answer to each of `sums`, as a list of equations."""
    prompts, completions = [f"{n}=" for n in sums], []
    for i in range(0, len(prompts), CHUNK):
        completions += generate(model, prompts[i : i + CHUNK], greedy, generator)
    return [prompt + completion for prompt, completion in zip(prompts, completions)]


@torch.no_grad()
def logps_of(model, answers):
    """log pi(y|x) in nats of the completion of each answer: (answers,).

    Raises InputError if one is not finite, as happens where the learning rate was too high.
    """
    splits = [answer.partition("=") for answer in answers]
    examples = [(prompt + "=", completion) for prompt, _, completion in splits]
    chunks = [examples[i : i + CHUNK] for i in range(0, len(examples), CHUNK)]
    device = device_of(model)
    logps = torch.cat([completion_logps(model, *collate(chunk, device)).cpu() for chunk in chunks])
    if not logps.isfinite().all():
        raise InputError("the model's log-probs are not finite any more; try a lower --lr")
    return logps


def logratios_of(model, reference, answers):
    """log pi - log pi_ref in nats of the completion of each answer: (answers,)."""
    return logps_of(model, answers) - logps_of(reference, answers)


def save_checkpoint(path, model, args, log):
    """Writes {"config", "model", "args", "log"}, of plain types; the log is a list of dicts."""
    buffer, config = io.BytesIO(), dataclasses.asdict(model.config)
    torch.save({"config": config, "model": model.state_dict(), "args": args, "log": log}, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """The model, in evaluation mode, and the args and the log of its training; else InputError."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), dict(checkpoint["args"]), list(checkpoint["log"])
    except FileNotFoundError:
        raise InputError(f"there is no {path}; train_sft.py writes the first checkpoint") from None
    except Exception as error:  # torch.load has no one type for what is no checkpoint
        reason = f"{type(error).__name__}: {error}".split("\n")[0].split(". ")[0]
        raise InputError(f"{path} is no checkpoint of this version ({reason})") from None


def fingerprint(model):
    """A hash of the weights, by which a checkpoint names its reference."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()
