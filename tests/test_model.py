"""The Transformer against a plain one, its log-probs and samples against loops, checkpoints."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import CUT_OFF, END, PAD, VOCAB_SIZE, InputError, collate, decode, encode
from data import random_equations
from model import GPT, PROMPT_WIDTH, GPTConfig, completion_logps, fingerprint, generate
from model import load_checkpoint, positions_of, save_checkpoint

PROMPTS = ["100=", "43=", "9=", "5=", "77=", "999="]


def random_model():
    """Every weight is random, so that nothing cancels by chance. Many answers end, but not all."""
    torch.manual_seed(47)
    model = GPT(GPTConfig(depth=2, width=16, heads=2, max_sum=20)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    torch.nn.init.ones_(model.norm.weight)
    return model


@pytest.fixture(scope="module")
def model():
    """In double precision, where rounding is far below what the tests tolerate."""
    return random_model().double()


def plain_logits(model, tokens):
    """The token after each of one row, from the weights alone: no batch, padding or cache."""
    w, heads = model.state_dict(), model.config.heads
    first = PROMPT_WIDTH - 1 - tokens.index(11)  # "=" is token 11, and its position is 3
    x = w["token_embedding.weight"][tokens]
    x = x + w["position_embedding.weight"][first : first + len(tokens)]
    for i in range(model.config.depth):
        b = {name.removeprefix(f"blocks.{i}."): weight for name, weight in w.items()}
        y = F.layer_norm(x, x.shape[1:], b["norm1.weight"], b["norm1.bias"])
        q, k, v = (y @ b["attention.qkv.weight"].T).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(0, 1).flatten(1) @ b["attention.out.weight"].T
        y = F.layer_norm(x, x.shape[1:], b["norm2.weight"], b["norm2.bias"])
        left, right = (y @ b["mlp.inner.weight"].T).chunk(2, 1)
        x = x + (left * right) @ b["mlp.out.weight"].T
    return F.layer_norm(x, x.shape[1:], w["norm.weight"], w["norm.bias"]) @ w["head.weight"].T


def plain_logp(model, prompt, completion):
    """The log-prob of a completion, one token at a time, with sums of exps in Python floats."""
    tokens, logp = collate([(prompt, completion)])[0][0].tolist(), 0.0
    for t in range(len(prompt), len(tokens)):
        logits = plain_logits(model, tokens[:t])[-1].tolist()
        logp += logits[tokens[t]] - math.log(sum(math.exp(x) for x in logits))
    return logp


def test_logits_equal_those_of_a_plain_transformer(model):
    """The attention of the plain one is that of torch. Padding has neither input nor output."""
    rows = [encode(x) for x in ("9=4+5", "100=50+50", "43=", "20=1+19+0=2", "999=111+111+111+1")]
    tokens = torch.tensor([row + [PAD] * (20 - len(row)) for row in rows])
    logits = model(tokens)
    assert model.token_embedding.num_embeddings == model.head.out_features == PAD == VOCAB_SIZE
    assert logits[tokens == PAD].count_nonzero() == 0
    for row, got in zip(rows, logits):
        assert torch.allclose(got[: len(row)], plain_logits(model, row), atol=1e-10)


def test_positions_are_distances_from_the_first_equals_sign():
    tokens, _ = collate([("9=", "4+5"), ("43=", "1"), ("100=", "0=1")])
    assert positions_of(tokens).tolist() == [[2, *range(3, 10)], [1, *range(2, 9)], [*range(8)]]
    assert [GPTConfig(max_sum=n).block_size for n in (100, 999)] == [4 + 14 + 4 + 1, 4 + 19 + 4 + 1]


def examples_of_all_kinds():
    """Not sorted by length; digits 0; empty, cut off, and of all the columns that there are."""
    examples = random_equations(np.random.default_rng(0), 50, range(5, 21))
    examples += [("10=", ""), ("999=", "0+0"), ("7=", CUT_OFF), ("10=", "0"), ("20=", "1+1=+2")]
    return examples + [("9=", "1+1+1+1+1+1+1+1+1" + CUT_OFF), ("20=", "1+1+1+1+1+1+1+11")]


def test_logps_equal_a_plain_loop_whatever_the_batch_the_order_and_the_padding(model):
    examples = examples_of_all_kinds()
    expected = [plain_logp(model, *example) for example in examples]
    tokens, mask = collate(examples)
    assert completion_logps(model, tokens, mask).tolist() == pytest.approx(expected, abs=1e-9)
    wider = F.pad(tokens, (0, 3), value=PAD), F.pad(mask, (0, 3))
    assert completion_logps(model, *wider).tolist() == pytest.approx(expected, abs=1e-9)
    turned = completion_logps(model, *collate(examples[::-1]))
    assert turned.tolist() == pytest.approx(expected[::-1], abs=1e-9)
    alone = [completion_logps(model, *collate([example])).item() for example in examples]
    assert alone == pytest.approx(expected, abs=1e-9)


def test_a_fresh_model_guesses_uniformly_and_token_id_zero_counts():
    """A masked token is worth log 13 nats, the digit 0 and the end token too."""
    batch = collate([("10=", answer) for answer in ("4+5", "0", "00", "", "0" + CUT_OFF, CUT_OFF)])
    logps = completion_logps(GPT(GPTConfig(depth=1, width=16, heads=2)), *batch)
    assert logps.tolist() == pytest.approx([-n * math.log(13) for n in (4, 2, 3, 1, 1, 0)])


def test_no_rows_give_no_logps_no_answers_and_zero_gradients(model):
    """Every weight has a gradient even so: processes add them up."""
    logps = completion_logps(model, *collate([]))
    assert logps.shape == (0,)
    model.zero_grad()
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
    assert generate(model, []) == generate(model, [], greedy=True) == []


def test_greedy_answers_equal_full_forward_passes_one_by_one(model):
    """Prompts of one, two and three digits in a batch; rows end each in its own time, or never."""
    prompts = [f"{n}=" for n in (100, 43, 9, 5, 77, 999, *range(1, 60), *range(300, 330))]
    expected = []
    for prompt in prompts:
        answer = []
        while len(answer) < 14 + 3 + 1 and END not in answer:  # a completion, a term and the end
            answer.append(plain_logits(model, encode(prompt) + answer)[-1].argmax().item())
        expected.append(decode(answer))
    assert generate(model, prompts, greedy=True) == expected
    assert 5 < sum(answer.endswith(CUT_OFF) for answer in expected) < len(prompts) - 5
    assert len(set(map(len, expected))) >= 4  # many rows end at other times


def sample(model, prompts, seed=0):
    return generate(model, prompts, generator=torch.Generator().manual_seed(seed))


def test_samples_follow_the_models_probabilities_in_every_column(model):
    """Counts of all tokens, and log-probs of the drawn ones, are within 5 standard errors.

    The log-probs show whether a row continues its own text or another's.
    """
    tokens, mask = collate(list(zip(PROMPTS * 400, sample(model, PROMPTS * 400))))
    assert mask[:, 2:20].sum(0).min() > 200 and (tokens == END).any(1).logical_not().sum() > 200
    with torch.no_grad():
        p = model(tokens)[:, :-1].softmax(-1)  # (B, T - 1, V)
    drawn = F.one_hot(tokens[:, 1:], VOCAB_SIZE + 1)[:, :, :VOCAB_SIZE]
    surprise = (drawn * p.log()).sum(-1, keepdim=True)
    mean, square = ((p * p.log() ** k).sum(-1, keepdim=True) for k in (1, 2))
    alive = mask[:, 1:, None]
    cases = (drawn, p, p * (1 - p)), (surprise, mean, square - mean.square())
    for (x, expected, variance), summed in product(cases, (0, (0, 1))):
        off = ((x - expected) * alive).sum(summed)
        assert (off.square() <= 25 * (variance * alive).sum(summed) + 1e-3).all()


def test_a_diverged_model_still_answers():
    model = random_model()
    torch.nn.init.constant_(model.head.weight, torch.nan)
    answers = sample(model, PROMPTS) + generate(model, PROMPTS, greedy=True)
    assert len(answers) == 2 * len(PROMPTS) and set("".join(answers)) <= set("0123456789+=…")


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model, path, log = random_model(), tmp_path / "model.pt", tmp_path / "model.jsonl"
    save_checkpoint(str(path), model, {"seed": 3, "lr": 0.1}, [{"step": 1}, {"loss": None}])
    loaded, args = load_checkpoint(path)
    assert set(tmp_path.iterdir()) == {path, log}
    assert log.read_text() == '{"step": 1}\n{"loss": null}\n'
    assert args == {"seed": 3, "lr": 0.1} and loaded.config == model.config
    assert not loaded.training and fingerprint(loaded) == fingerprint(model)
    batch = collate([("9=", "4+5"), ("20=", "1+19")])
    assert torch.equal(completion_logps(loaded, *batch), completion_logps(model, *batch))


def test_bad_checkpoints_get_one_clear_line(tmp_path):
    path = tmp_path / "truncated.pt"
    save_checkpoint(str(path), random_model(), {}, ["a log is no checkpoint"])
    checkpoint = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:3000])
    config, (*fewer, _) = checkpoint["config"], checkpoint["model"].items()
    cases = [{name: checkpoint[name] for name in checkpoint.keys() - {key}} for key in checkpoint]
    cases += [[1, 2], checkpoint | {"args": 5}, checkpoint | {"model": dict(fewer)}]
    cases += [checkpoint | {"config": x} for x in ({"n_layer": 6}, config | {"depth": "6"})]
    for i, content in enumerate(cases):
        torch.save(content, tmp_path / f"{i}.pt")
    (tmp_path / "folder").mkdir()
    for path in [tmp_path / "none", *tmp_path.iterdir()]:
        with pytest.raises(InputError) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_fingerprint_tells_any_weight_that_differs():
    model = random_model()
    seen = {fingerprint(model)}
    weights = [p.data.view(-1)[i:][:1] for p in model.parameters() for i in (0, -1)]
    for weight in weights:
        weight += 1e-3
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(weights)
