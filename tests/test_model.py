"""The Transformer against a plain one, its log-probs and samples against loops, checkpoints."""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import plain_logits, plain_logp, random_model

from data import CUT_OFF, END, VOCAB_SIZE, InputError, collate, decode, encode, random_equations
from model import (GPT, GPTConfig, answers_to, completion_logps, fingerprint, generate,
                   load_checkpoint, logps_of, logratios_of, save_checkpoint)  # fmt: skip

PROMPTS = ["100=", "43=", "9=", "5=", "77=", "999="]
COLUMNS = 4 + 14 + 3 + 1  # a prompt, the longest completion up to 20, a stray term and the end


@pytest.fixture(scope="module")
def model():
    """In double precision, where rounding is far below what the tests tolerate."""
    return random_model().double()


def sample(model, prompts, seed=0):
    return generate(model, prompts, generator=torch.Generator().manual_seed(seed))


def test_logits_equal_those_of_a_plain_transformer_whatever_comes_later_in_the_row(model):
    """The attention of the plain one is that of torch."""
    rows = [encode(x) for x in ("009=4+5", "100=50+50", "043=", "020=1+19+0=2", "999=111+1+11+111")]
    tokens = torch.randint(VOCAB_SIZE, (len(rows), COLUMNS))
    for row, filled in zip(rows, tokens):
        filled[: len(row)] = torch.tensor(row)
    for row, got in zip(rows, model(tokens)):
        assert torch.allclose(got[: len(row)], plain_logits(model, row), atol=1e-10)


def test_a_fresh_model_guesses_uniformly_and_its_blocks_change_nothing():
    torch.manual_seed(0)
    model, x = GPT(GPTConfig()), torch.randn(2, 5, 48)
    assert (model(torch.randint(VOCAB_SIZE, (2, 5))) == 0).all()
    assert all(torch.equal(block(x)[0], x) for block in model.blocks)
    for embedding in (model.token_embedding, model.position_embedding):
        assert embedding.weight.std().item() == pytest.approx(0.2, rel=0.1)


def test_logps_equal_a_plain_loop_whatever_the_batch_the_order_and_what_fills_the_rows(model):
    """Examples with digits 0; empty, cut off, and of all the columns that there are."""
    examples = random_equations(random.Random(0), 50, range(5, 21))
    examples += [("10=", ""), ("999=", "0+0"), ("7=", CUT_OFF), ("10=", "0"), ("20=", "1+1=+2")]
    examples += [("9=", "1+" * 9 + CUT_OFF), ("20=", "1+1+1+1+1+1+1+11")]
    expected = [plain_logp(model, prompt + completion) for prompt, completion in examples]
    tokens, mask = collate(examples)
    assert completion_logps(model, tokens, mask).tolist() == pytest.approx(expected, abs=1e-9)
    for filler in range(VOCAB_SIZE):
        filled = tokens.where((torch.arange(tokens.shape[1]) < 4) | mask, filler)
        wider = F.pad(filled, (0, 1), value=filler), F.pad(mask, (0, 1))
        assert completion_logps(model, *wider).tolist() == pytest.approx(expected, abs=1e-9)
    turned = completion_logps(model, *collate(examples[::-1]))
    assert turned.tolist() == pytest.approx(expected[::-1], abs=1e-9)
    alone = [completion_logps(model, *collate([example])).item() for example in examples]
    assert alone == pytest.approx(expected, abs=1e-9)


def test_answers_and_logps_keep_their_order_over_several_chunks(model, monkeypatch):
    """Chunks of four, the last of which is not full; the sums have one, two and three digits."""
    sums, other = [5, 999, 20, 7, 9, 100, 43, 9, 12, 5], random_model(seed=1).double()
    completions = generate(model, [f"{n}=" for n in sums], greedy=True)
    monkeypatch.setattr("model.CHUNK", 4)
    answers = answers_to(model, sums, greedy=True)
    assert answers == [f"{n}={completion}" for n, completion in zip(sums, completions)]
    answers += answers_to(model, sums, generator=torch.Generator().manual_seed(0))
    assert answers[-4:] != answers[6:10]  # the same sums, but sampled
    expected = [plain_logp(model, equation) for equation in answers]
    assert logps_of(model, answers).tolist() == pytest.approx(expected)
    ratios = [logp - plain_logp(other, equation) for equation, logp in zip(answers, expected)]
    assert logratios_of(model, other, answers).tolist() == pytest.approx(ratios)


def test_greedy_answers_equal_full_forward_passes_one_by_one(model):
    """Prompts of one, two and three digits in a batch; rows end each in its own time, or never."""
    prompts = [f"{n}=" for n in (100, 43, 9, 5, 77, 999, *range(1, 60), *range(300, 330))]
    expected = []
    for prompt in prompts:
        row = encode(f"{prompt:0>4}")
        while len(row) < COLUMNS and END not in row:
            row.append(plain_logits(model, row)[-1].argmax().item())
        expected.append(decode(row[4:]))
    assert generate(model, prompts, greedy=True) == expected
    short = [x for x, y in zip(prompts, expected) if len(y) < 5][:3]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    longest = max(map(len, generate(model, short, greedy=True)))
    handle.remove()
    assert len(calls) == longest + 1 < COLUMNS - 4  # it stops when all rows have ended
    assert 5 < sum(completion.endswith(CUT_OFF) for completion in expected) < len(prompts) - 5
    assert len(set(map(len, expected))) >= 4  # many rows end at other times


def test_samples_follow_the_models_probabilities_in_every_column(model):
    """Counts of all tokens are within 5 standard errors of their expectation, given each row."""
    completions = sample(model, PROMPTS * 400)
    tokens, mask = collate(list(zip(PROMPTS * 400, completions)))
    assert tokens.shape[1] == COLUMNS and mask[:, 4:20].sum(0).min() > 200
    assert sum(completion.endswith(CUT_OFF) for completion in completions) > 100
    with torch.no_grad():
        p = model(tokens)[:, :-1].softmax(-1)  # (B, T - 1, V)
    alive = mask[:, 1:, None]
    off = ((F.one_hot(tokens[:, 1:], VOCAB_SIZE) - p) * alive).sum(0)
    assert (off.square() <= 25 * (p * (1 - p) * alive).sum(0) + 1e-3).all()


def test_log_probs_that_are_not_finite_are_reported():
    model = random_model()
    model.head.weight.data[3, 0] = torch.nan
    with pytest.raises(InputError, match="lower --lr"):
        logps_of(model, ["9=4+5"])
    assert len(generate(model, ["9="])) == 1  # it writes noise


def test_a_prompt_is_read_with_zeros_before_it_and_one_that_does_not_fit_is_refused(model):
    assert sample(model, ["9=", "43=", "7="]) == sample(model, ["009=", "043=", "07="])
    assert sample(model, PROMPTS) == sample(model, PROMPTS) != sample(model, PROMPTS, seed=1)
    for prompt in ("1000=", "x=", "9"):
        with pytest.raises(ValueError):
            generate(model, ["9=", prompt])


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model, path, log = random_model(), tmp_path / "model.pt", [{"step": 1}, {"loss": None}]
    save_checkpoint(path, model, {"seed": 3, "lr": 0.1}, log)
    loaded, args, loaded_log = load_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.load(path, weights_only=True)["log"] == loaded_log == log
    assert args == {"seed": 3, "lr": 0.1} and loaded.config == model.config
    assert not loaded.training and fingerprint(loaded) == fingerprint(model)


def test_bad_checkpoints_get_one_clear_line(tmp_path):
    path = tmp_path / "truncated.pt"
    save_checkpoint(path, random_model(), {}, [])
    checkpoint = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:3000])
    config, (*fewer, _) = checkpoint["config"], checkpoint["model"].items()
    cases = [{name: checkpoint[name] for name in checkpoint.keys() - {key}} for key in checkpoint]
    cases += [[1, 2], checkpoint | {"args": 5}, checkpoint | {"model": dict(fewer)}]
    cases += [checkpoint | {"config": x} for x in ({"n_layer": 6}, config | {"depth": "6"})]
    for i, content in enumerate(cases):
        torch.save(content, tmp_path / f"{i}.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("9=4+5\n")
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
