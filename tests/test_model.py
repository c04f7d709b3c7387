"""The Transformer's invariants, log-probs and samples against plain loops, and checkpoints."""

import math
import re

import numpy as np
import pytest
import torch

from data import END, PAD, PROMPT_WIDTH, VOCAB_SIZE, InputError, collate, encode
from data import random_equations, replacing
from model import GPT, GPTConfig, Packing, add_up, completion_logps, find_device, fingerprint
from model import generate, load_checkpoint, save_checkpoint, token_logps

PROMPTS = ["100=", "43=", "9=", "5=", "77=", "999="]


def random_model():
    """Every weight is random, so that nothing cancels by chance; most answers end, not all."""
    torch.manual_seed(37)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.constant_(model.norm.weight, 1)
    with torch.no_grad():
        end = model.head.weight[END]
        model.norm.bias += end / end.square().sum()
    return model


@pytest.fixture(scope="module")
def model():
    """In double precision, where rounding is far below what the tests tolerate."""
    return random_model().double()


def padded(text):
    """Token ids of a text whose prompt ends in column 4: "9=4" -> [PAD] * 3 + [9, 11, 4]."""
    return [PAD] * (PROMPT_WIDTH - 1 - text.index("=")) + encode(text)


def plain_logps(model, tokens):
    """Of the tokens after the prompt, one by one: no batch, and sums of exps in Python floats."""
    logps = []
    for t in range(PROMPT_WIDTH, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:t]]))[0, -1].tolist()
        logps.append(logits[tokens[t]] - math.log(sum(math.exp(x) for x in logits)))
    return logps


def test_logps_equal_a_plain_loop_whatever_the_batch_and_the_padding(model):
    """Many rows, not sorted by length, from none to all columns in use; some begin alike.

    Of the longest two, the first 16 columns are the same.
    """
    rng = np.random.default_rng(0)
    examples = [*random_equations(rng, 150, range(5, 21)), ("10=", ""), ("999=", "0+0")]
    examples += [("20=", "1+1+1+1+1+1+1"), ("20=", "1+1+1+1+1+1+2"), ("20=", "1+1+1+1+1+1+1")]
    lengths = [len(completion) for _, completion in examples]
    assert lengths != sorted(lengths)
    tokens, mask = collate(examples)
    per_token, summed = (f(model, tokens, mask) for f in (token_logps, completion_logps))
    assert per_token.shape == (len(examples), tokens.shape[1] - 1)
    for i, (prompt, completion) in enumerate(examples):
        expected = plain_logps(model, padded(prompt + completion) + [END])
        assert per_token[i][mask[i, 1:]].tolist() == pytest.approx(expected, abs=1e-9)
        assert per_token[i][~mask[i, 1:]].count_nonzero() == 0
        assert summed[i].item() == pytest.approx(sum(expected), abs=1e-9)
    for i in (0, 70, 151):
        alone = completion_logps(model, *collate([examples[i]]))
        assert alone.item() == pytest.approx(summed[i].item(), abs=1e-9)
    wider = torch.nn.functional.pad(tokens, (0, 2)), torch.nn.functional.pad(mask, (0, 2))
    assert completion_logps(model, *wider).tolist() == pytest.approx(summed.tolist(), abs=1e-9)


def test_gradients_of_a_large_batch_equal_those_of_its_rows(model):
    examples = random_equations(np.random.default_rng(1), 70, range(5, 21))
    weights = torch.arange(1.0, len(examples) + 1, dtype=torch.float64)  # no row is like another
    model.zero_grad()
    (weights * completion_logps(model, *collate(examples))).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for weight, example in zip(weights, examples):
        (weight * completion_logps(model, *collate([example]))).sum().backward()
    for p, grad in zip(model.parameters(), together):
        assert torch.allclose(p.grad, grad, atol=1e-7)


def test_equal_prefixes_are_computed_once(model):
    tokens, mask = collate(random_equations(np.random.default_rng(0), 100, range(5, 21)))
    inputs = [row[: row.index(END)] for row in tokens.tolist()]
    prefixes = {tuple(row[: t + 1]) for row in inputs for t in range(len(row)) if row[t] != PAD}
    assert len(prefixes) < 0.7 * (tokens[:, :-1].lt(END)).sum()
    rows = []
    hook = model.blocks[0].register_forward_hook(lambda block, args, out: rows.append(len(out)))
    token_logps(model, tokens, mask)
    hook.remove()
    assert rows == [len(prefixes)]


def test_token_id_zero_counts(model):
    """A digit 0 in a completion has a log-prob like any other: masks never read token ids."""
    assert encode("0") == [0]
    assert torch.count_nonzero(token_logps(model, *collate([("10=", "0")]))) == 2  # 0 and END


def test_no_rows_give_no_logps_and_zero_gradients(model):
    """Every weight has a gradient even so: processes add them up."""
    model.zero_grad()
    tokens, mask = torch.zeros(0, 9, dtype=torch.long), torch.zeros(0, 9, dtype=torch.bool)
    assert token_logps(model, tokens, mask).shape == (0, 8)
    assert token_logps(model, *collate([])).shape == (0, PROMPT_WIDTH)
    completion_logps(model, tokens, mask).sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())


def test_attention_equals_that_of_torch(model):
    B, T = 2, 11
    tokens = torch.zeros(B, T, dtype=torch.long)  # without padding, of which torch knows nothing
    attention = model.blocks[0].attention
    x = torch.randn(B, T, 16, dtype=torch.float64)
    qkv = attention.qkv(x).view(B, T, 3, 2, 8).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    y = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    expected = attention.out(y.transpose(1, 2).reshape(B, T, 16))
    got = attention(x.flatten(0, 1), Packing(tokens, heads=2, past=1)).view(B, T, 16)
    assert torch.allclose(got, expected, atol=1e-12)


def test_no_position_sees_what_comes_after_it(model):
    """Each column alone is changed: the logits before it stay, its own and all later ones do not.

    Padding is neither seen nor sees.
    """
    tokens, _ = collate([("100=", "50+50"), ("43=", "10+30+3"), ("9=", "3+3+3")])
    used = tokens != PAD
    before = model(tokens)
    assert before[~used].count_nonzero() == 0
    for t in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % END  # another token, and not PAD
        after = model(changed)
        assert torch.allclose(after[:, :t], before[:, :t], atol=1e-12)
        assert ((after - before).abs().amax(2) > 1e-4)[:, t:][used[:, t:]].all()


def test_greedy_answers_equal_full_forward_passes_one_by_one(model):
    """Prompts of one, two and three digits in a batch; some rows end, each in its own time."""
    prompts = [f"{n}=" for n in (100, 43, 9, 5, 77, 999, *range(1, 60))]
    tokens, mask = generate(model, prompts, greedy=True)
    lengths = []
    for i, prompt in enumerate(prompts):
        expected = padded(prompt)
        while len(expected) < model.config.block_size and expected[-1] != END:
            with torch.no_grad():
                expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
        lengths.append(len(expected))
        assert tokens[i, : lengths[i]].tolist() == expected
        assert (tokens[i, lengths[i] :] == PAD).all()
        assert mask[i].tolist() == [PROMPT_WIDTH <= t < lengths[i] for t in range(tokens.shape[1])]
    ended = (tokens == END).any(1)
    assert ended.any() and not ended.all() and len(set(lengths)) >= 4


def sample(model, prompts, seed=0):
    return generate(model, prompts, generator=torch.Generator().manual_seed(seed))


def test_logps_of_samples_equal_a_plain_loop(model):
    """Tokens and mask as they were generated: ended at different times, or cut off."""
    tokens, mask = sample(model, PROMPTS * 15)
    lengths = (torch.arange(1, tokens.shape[1] + 1) * mask).amax(1).tolist()
    ended = (tokens == END).any(1)
    assert ended.any() and not ended.all() and len(set(lengths)) > 4
    logps = completion_logps(model, tokens, mask).tolist()
    for i, (row, length) in enumerate(zip(tokens.tolist(), lengths)):
        assert row[:PROMPT_WIDTH] == padded(PROMPTS[i % len(PROMPTS)])
        assert mask[i].tolist() == [PROMPT_WIDTH <= t < length for t in range(len(row))]
        assert END not in row[: length - 1] and set(row[length:]) <= {PAD}
        assert row[length - 1] == END or length == model.config.block_size
        assert logps[i] == pytest.approx(sum(plain_logps(model, row[:length])), abs=1e-9)


def test_samples_follow_the_models_probabilities_in_every_column(model):
    """Of the rows still growing: how often each token comes, and how likely the drawn ones are.

    Expected values and variances are sums over each row's own next-token probabilities, by a full
    forward pass; tolerated are 5 standard errors, in each column and in all together. How likely
    the drawn token is shows whether a row continues its own text or another's.
    """
    tokens, mask = sample(model, PROMPTS * 400)
    assert mask[:, PROMPT_WIDTH:].sum(0).min() > 500  # rows in each column
    with torch.no_grad():
        p = model(tokens)[:, :-1].softmax(-1)  # (B, T - 1, V)
    drawn = torch.nn.functional.one_hot(tokens[:, 1:], VOCAB_SIZE)
    surprise = (drawn * p.log()).sum(-1, keepdim=True)
    mean = (p * p.log()).sum(-1, keepdim=True)
    square = (p * p.log().square()).sum(-1, keepdim=True)
    alive = mask[:, 1:, None]
    for values, expected, variance in (
        (drawn, p, p * (1 - p)),
        (surprise, mean, square - mean.square()),
    ):
        for summed in (0, (0, 1)):
            off = ((values - expected) * alive).sum(summed)
            assert (off.square() <= 25 * (variance * alive).sum(summed) + 1e-3).all()


def test_same_seed_same_samples(model):
    tokens, mask = sample(model, PROMPTS * 10)
    again, mask_again = sample(model, PROMPTS * 10)
    assert torch.equal(tokens, again) and torch.equal(mask, mask_again)
    other, _ = sample(model, PROMPTS * 10, seed=1)
    assert not torch.equal(tokens[:, : PROMPT_WIDTH + 1], other[:, : PROMPT_WIDTH + 1])
    global_state = torch.get_rng_state()
    sample(model, PROMPTS)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_a_diverged_model_still_answers():
    model = random_model()
    torch.nn.init.constant_(model.head.weight, torch.nan)
    tokens, mask = sample(model, PROMPTS)
    assert tokens.shape == mask.shape and mask.any(1).all()


def test_checkpoint_round_trip(tmp_path):
    model, path = random_model(), tmp_path / "model.pt"
    with replacing(path) as [file]:
        save_checkpoint(file, model, {"seed": 3, "lr": 0.1})
    loaded, args = load_checkpoint(path)
    assert args == {"seed": 3, "lr": 0.1} and loaded.config == model.config
    assert not loaded.training and loaded.state_dict().keys() == model.state_dict().keys()
    batch = collate([("9=", "4+5"), ("20=", "1+19")])
    assert torch.equal(completion_logps(loaded, *batch), completion_logps(model, *batch))
    assert fingerprint(loaded) == fingerprint(model)


def test_fingerprint_tells_any_weight_that_differs():
    model = random_model()
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_bad_checkpoints_get_one_clear_line(tmp_path):
    good, truncated, text = (tmp_path / name for name in ("good.pt", "truncated.pt", "text.pt"))
    with replacing(good) as [file]:
        save_checkpoint(file, random_model(), {})
    truncated.write_bytes(good.read_bytes()[:3000])
    text.write_text("not a checkpoint")
    cases = [
        (tmp_path / "none.pt", "there is no checkpoint "),
        (truncated, " is not a checkpoint, or is cut short: "),
        (text, " is not a checkpoint, or is cut short: "),
        (tmp_path, " is not a checkpoint, or is cut short: "),
    ]
    checkpoint = torch.load(good, weights_only=True)
    config, fewer = checkpoint["config"], dict(checkpoint["model"])
    del fewer["head.weight"]
    for name, content in {
        "list": [1, 2],
        "no-model": {"config": config, "args": {}},
        "no-args": {"config": config, "model": checkpoint["model"]},
        "other-config": checkpoint | {"config": {"n_layer": 6}},
        "other-shape": checkpoint | {"config": config | {"width": 32}},
        "weight-too-few": checkpoint | {"model": fewer},
        "text-for-depth": checkpoint | {"config": config | {"depth": "6"}},
    }.items():
        torch.save(content, tmp_path / name)
        cases.append((tmp_path / name, " is not of this version of model.py; "))
    for path, complaint in cases:
        with pytest.raises(InputError, match=re.escape(complaint)) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    assert find_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "abacus", "meta", ""):
        with pytest.raises(InputError, match=f"--device {name} is not there"):
            find_device(name)
    monkeypatch.setenv("LOCAL_RANK", "77")
    with pytest.raises(InputError, match="--device cuda:77 is not there"):
        find_device("cuda")


def test_one_process_alone_has_nothing_to_add():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    add_up(tensors)
    assert [x.tolist() for x in tensors] == [[1.0, 2.0], 3.0]


def test_no_prompt_no_answer(model):
    """A process whose part of a batch is empty has nothing to generate."""
    tokens, mask = generate(model, [])
    assert tokens.shape == mask.shape and len(tokens) == 0
