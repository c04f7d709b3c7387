"""What several test files share: tiny models, and the Transformer written a second time.

The plain Transformer reads one row at a time, in double precision, without a batch, a mask of
completions or a cache.
"""

import torch
import torch.nn.functional as F

from data import CUT_OFF, collate
from model import GPT, GPTConfig, completion_logps

torch.set_num_threads(1)  # faster, for the tensors are tiny
ALPHABET = "0123456789+=$"  # a character a token; the dollar sign stands for the end


def random_model(seed=47):
    """Every weight is random, so that nothing cancels by chance. Many answers end, but not all."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.ones_(model.norm.weight)
    return model


def taught_model(examples):
    """A model that has learned to write the completions of these examples, more or less."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        (-completion_logps(model, *collate(examples)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def mixed_model(sums):
    """About a third each of its answers have three terms, are right with two, and are wrong."""
    forms = (lambda n: f"1+2+{n - 3}", lambda n: f"{n - 1}+1", lambda n: f"1+{n - 2}")
    return taught_model([(f"{n}=", form(n)) for n in sums for form in forms])


def plain_logits(model, tokens):
    """Of the token after each of one row, (T, V), from the weights alone. Gradients flow."""
    w = {name: weight.double() for name, weight in model.named_parameters()}
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][: len(tokens)]
    for i in range(model.config.depth):
        b = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items()}
        y = F.layer_norm(x, x.shape[1:], b["norm1.weight"], b["norm1.bias"])
        qkv = (y @ b["attention.qkv.weight"].T).view(len(x), 3, model.config.heads, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(1, 2, 0, 3), is_causal=True)
        x = x + y.transpose(0, 1).flatten(1) @ b["attention.out.weight"].T
        y = F.layer_norm(x, x.shape[1:], b["norm2.weight"], b["norm2.bias"])
        left, right = (y @ b["mlp.inner.weight"].T).chunk(2, 1)
        x = x + (left * right) @ b["mlp.out.weight"].T
    return F.layer_norm(x, x.shape[1:], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T


def token_logps(model, equation):
    """log pi of each token after the equals sign: (tokens,). Gradients flow.

    The end token is one of them, unless the equation closes with an ellipsis.
    """
    prompt, _, completion = equation.partition("=")
    ending = "" if completion.endswith(CUT_OFF) else "$"
    text = f"{prompt:0>3}={completion.removesuffix(CUT_OFF)}{ending}"
    tokens = [ALPHABET.index(character) for character in text]
    logits = plain_logits(model, tokens[:-1])[3:]
    return logits[range(len(logits)), tokens[4:]] - logits.exp().sum(1).log()


def plain_logp(model, equation):
    """log pi of the completion of an equation, a float."""
    return token_logps(model, equation).sum().item()
