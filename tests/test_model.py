"""The Transformer's invariants, its log-probs against a plain loop, and its checkpoints."""

import math

import pytest
import torch

import data
from data import END, InputError, collate, decode
from model import (
    GPT,
    GPTConfig,
    Muon,
    completion_logps,
    find_device,
    generate,
    load_checkpoint,
    save_checkpoint,
    token_logps,
)

EXAMPLES = [
    ("100=", "50+50"),
    ("43=", "10+30+3"),
    ("9=", "3+3+3"),
    ("10=", "0"),
    ("87=", "1+2+3+4+77"),
]


@pytest.fixture
def model():
    """A small model with every weight random, so that nothing cancels by chance."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(depth=3, width=16, heads=2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.head.weight, std=2.0)
    return model


def plain_token_logps(model, prompt, completion):
    """Token by token with no padding, mask or batch: probabilities normalised in Python floats."""
    tokens = data.encode(prompt + completion) + [END]
    logps = []
    for t in range(len(prompt), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[:t]]))[0, -1].tolist()
        logps.append(logits[tokens[t]] - math.log(sum(math.exp(x) for x in logits)))
    return logps


def test_logps_equal_a_plain_loop_whatever_the_padding(model):
    tokens, mask = collate(EXAMPLES)
    per_token = token_logps(model, tokens, mask)
    summed = completion_logps(model, tokens, mask)
    for i, (prompt, completion) in enumerate(EXAMPLES):
        expected = plain_token_logps(model, prompt, completion)
        assert per_token[i][mask[i, 1:]].tolist() == pytest.approx(expected, abs=1e-4)
        assert per_token[i][~mask[i, 1:]].abs().sum() == 0
        assert summed[i].item() == pytest.approx(sum(expected), abs=1e-4)
        alone = completion_logps(model, *collate([EXAMPLES[i]]))
        assert alone.item() == pytest.approx(summed[i].item(), abs=1e-4)


def test_token_id_zero_counts(model):
    """A digit 0 in a completion has a log-prob like any other: masks never read token ids."""
    assert data.encode("0") == [0]
    per_token = token_logps(model, *collate([("10=", "0")]))
    assert torch.count_nonzero(per_token) == 2  # the 0 and the end token


def test_logits_of_used_positions_do_not_depend_on_the_rest(model):
    tokens, _ = collate(EXAMPLES)
    everywhere = model(tokens)
    used = tokens != data.PAD
    assert torch.allclose(model(tokens, used)[used], everywhere[used], atol=1e-5)
    assert model(tokens, used)[~used].abs().sum() == 0


def test_muon_steps_as_the_one_of_torch_does(model):
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    muon = Muon(matrices, lr=0.1)
    copies = [torch.nn.Parameter(matrix.detach().clone()) for matrix in matrices]
    oracle = torch.optim.Muon(copies, lr=0.1, weight_decay=0, momentum=0.95)
    starts = [matrix.detach().clone() for matrix in matrices]
    for _ in range(3):
        for matrix, copy in zip(matrices, copies):
            matrix.grad = torch.randn_like(matrix)
            copy.grad = matrix.grad.clone()
        muon.step()
        oracle.step()
    for matrix, copy, start in zip(matrices, copies, starts):
        moved, expected = matrix - start, copy - start  # the oracle computes in bfloat16
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_no_position_sees_what_comes_after_it(model):
    tokens, _ = collate(EXAMPLES)
    changed = tokens.clone()
    changed[:, 6:] = 1
    assert torch.allclose(model(tokens)[:, :6], model(changed)[:, :6], atol=1e-5)
    assert not torch.allclose(model(tokens)[:, 6:], model(changed)[:, 6:], atol=1e-2)


def test_cached_greedy_generation_equals_full_forward_passes_one_by_one(model):
    prompts = ["100=", "43=", "9=", "5=", "77="]
    tokens, mask = generate(model, prompts, greedy=True)
    for i, prompt in enumerate(prompts):
        expected = data.encode(prompt)
        while len(expected) < model.config.block_size and expected[-1] != END:
            with torch.no_grad():
                expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
        length = len(expected)
        assert tokens[i, :length].tolist() == expected
        assert mask[i].tolist() == [len(prompt) <= t < length for t in range(tokens.shape[1])]
        assert (tokens[i, length:] == data.PAD).all()


def test_sampling_follows_the_models_probabilities(model):
    """Shares of the first tokens of 4,000 samples against their probabilities (5 std. errors)."""
    n = 4000
    tokens, mask = generate(model, ["9="] * n, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = model(torch.tensor([data.encode("9=")]))[0, -1].softmax(0)
    shares = torch.bincount(tokens[:, 2], minlength=data.VOCAB_SIZE) / n
    errors = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((shares - probabilities).abs() <= 5 * errors + 1e-4).all()

    again, _ = generate(model, ["9="] * n, generator=torch.Generator().manual_seed(0))
    other, _ = generate(model, ["9="] * n, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tokens, again) and not torch.equal(tokens[:, :3], other[:, :3])
    assert decode(tokens[0].tolist()).startswith("9=")


def test_checkpoint_round_trip(model, tmp_path):
    path = tmp_path / "runs" / "m.pt"
    save_checkpoint(path, model, {"seed": 3, "lr": 0.1})
    loaded, args = load_checkpoint(path)
    assert args == {"seed": 3, "lr": 0.1} and loaded.config == model.config
    tokens, mask = collate(EXAMPLES)
    assert torch.equal(
        completion_logps(loaded, tokens, mask), completion_logps(model, tokens, mask)
    )
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left


def test_bad_checkpoints_get_one_clear_line(model, tmp_path):
    good = tmp_path / "good.pt"
    save_checkpoint(good, model, {})
    checkpoint = torch.load(good, weights_only=True)

    truncated, text = tmp_path / "truncated.pt", tmp_path / "text.pt"
    truncated.write_bytes(good.read_bytes()[:3000])
    text.write_text("not a checkpoint")
    cases = [
        (tmp_path / "none.pt", "there is no"),
        (truncated, "cut short"),
        (text, "not a checkpoint"),
    ]
    foreign = {
        "list": [1, 2],
        "no-model": {"config": checkpoint["config"], "args": {}},
        "other-shape": checkpoint | {"config": checkpoint["config"] | {"width": 32}},
        "other-config": checkpoint | {"config": {"n_layer": 6}},
    }
    for name, content in foreign.items():
        torch.save(content, tmp_path / name)
        cases.append((tmp_path / name, "some other program"))
    vocabulary = tmp_path / "vocabulary.pt"
    torch.save(checkpoint | {"config": checkpoint["config"] | {"vocabulary": "abc"}}, vocabulary)
    cases.append((vocabulary, "has the vocabulary 'abc'"))

    for path, complaint in cases:
        with pytest.raises(InputError, match=complaint) as error:
            load_checkpoint(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_refused():
    assert find_device("cpu").type == "cpu"
    for name in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=f"--device {name} is not there"):
            find_device(name)
