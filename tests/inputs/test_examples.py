"""Example inputs of any shape are what a chat would send."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs, prompt_inputs
from glmtrt_helpers.inputs.names import STEP_INPUTS, past_from
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


def test_shapes_and_dtypes(checkpoint: Checkpoint) -> None:
    flat = example_inputs(checkpoint, 3, 2, 5, torch.float16)
    assert flat["input_ids"].shape == (3, 2) and flat["position_ids"].shape == (3, 2, 2)
    assert flat["attention_mask"].shape == (3, 1, 2, 7) and flat["attention_mask"].dtype == torch.bool
    past = flat["past_key_values.1.value"]
    assert past.shape == (5, 3, 4, 16) and past.dtype == torch.float16 and past.abs().max() > 0
    assert all(tensor.is_contiguous() for tensor in flat.values())


def test_the_same_seed_gives_the_same_inputs(checkpoint: Checkpoint) -> None:
    one, two, other = (example_inputs(checkpoint, 2, 5, 3, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])


def test_an_example_without_a_past_looks_as_prompts_of_those_lengths(checkpoint: Checkpoint) -> None:
    gmask, sop = checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]
    prompts = prompt_inputs(checkpoint, [[20] * (length - 2) + [gmask, sop] for length in (8, 5, 3)])
    example = example_inputs(checkpoint, 3, 8, 0, padding=(0, 3, 5))
    for name in ("position_ids", "attention_mask"):
        assert torch.equal(example[name], prompts[name])
    pad = checkpoint.config["pad_token_id"]
    assert torch.equal(example["input_ids"] == pad, prompts["input_ids"] == pad)


def test_an_example_that_ends_before_sop_sees_all_of_itself(checkpoint: Checkpoint) -> None:
    flat = example_inputs(checkpoint, 2, 4, 0, padding=(0, 1), sop=4)
    assert flat["position_ids"].tolist() == [[[0, 1, 2, 3], [0] * 4], [[0, 0, 1, 2], [0] * 4]]
    hidden = flat["attention_mask"][:, 0].int().tolist()
    assert hidden == [[[0] * 4] * 4, [[1] * 4] + [[1, 0, 0, 0]] * 3]


def test_a_prefill_in_two_calls_equals_one(checkpoint: Checkpoint) -> None:
    """The second call is the example with a past: <sop> is its first token."""
    session = TorchSession(loading.load_model(checkpoint))
    gmask, sop = checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]
    whole = prompt_inputs(checkpoint, [[20, 21, 22, gmask, sop, 30, 31]])
    first = session.run(
        whole
        | {
            "input_ids": whole["input_ids"][:, :4],
            "position_ids": whole["position_ids"][:, :, :4],
            "attention_mask": whole["attention_mask"][:, :, :4, :4],
        }
    )
    step = {name: example_inputs(checkpoint, 1, 3, 4)[name] for name in STEP_INPUTS}
    second = session.run({**step, "input_ids": whole["input_ids"][:, 4:], **past_from(first)})
    np.testing.assert_allclose(second["logits"][0, -1], session.run(whole)["logits"][0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 1, 0), (1, 0, 3), (1, 1, -1), (1, 600, 500)])
def test_impossible_shapes_are_refused(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> None:
    with pytest.raises(WorkbookError, match="is no input of"):
        example_inputs(checkpoint, *shape)
