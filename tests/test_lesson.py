"""What the project teaches, on a small scale: which pairs break the sums, and what mends it."""

import pytest

import train_dpo
import train_sft
from model import load_checkpoint

SFT = "--depth 2 --width 32 --heads 2 --max-sum 20 --batch-size 64 --steps 500 --lr 0.01"


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A model that writes about three right answers in ten, one of them with three terms."""
    path = tmp_path_factory.mktemp("lesson") / "sft.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "LOOKS", 1)  # to save time
        train_sft.main(train_sft.parse_args([*SFT.split(), f"--out={path}"]))
    return path


def change(sft, flags):
    """How preferred and exact answers change by a short run of DPO, and the pair accuracy."""
    path, flags = sft.parent / "dpo.pt", f"--steps 60 --batch-size 64 {flags}".split()
    train_dpo.main(train_dpo.parse_args([*flags, f"--sft={sft}", f"--out={path}"]))
    first, second, *_, last = load_checkpoint(path)[2]
    assert second["rewards/accuracies"] == 0.5  # all pairs tie while policy and reference agree
    preferred, exact = (last["own"][key] - first["own"][key] for key in ("preferred", "exact"))
    return preferred, exact, last["rewards/accuracies"]


def test_offline_pairs_are_won_and_the_sums_are_lost(sft):
    _, exact, accuracy = change(sft, "--pairs offline --lr 3e-3")
    assert accuracy > 0.95 and exact < -0.1


@pytest.mark.parametrize("flags", ["--pairs mistakes", "--pairs offline --kl-weight 0.1"])
def test_the_preference_is_learned_and_the_sums_are_kept(sft, flags):
    preferred, exact, _ = change(sft, f"{flags} --lr 1e-3")
    assert preferred > 0.1 and exact > -0.05
