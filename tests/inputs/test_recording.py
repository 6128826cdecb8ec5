"""Notebook 01's helpers: positions and masks against SPEC's formulas and the model's own, recording, examples."""

from pathlib import Path

import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs.reference import run_tensors
from glmtrt_helpers.inputs import recording
from glmtrt_helpers.inputs.examples import example_inputs, next_inputs, prompt_inputs
from glmtrt_helpers.inputs.names import forward_kwargs, input_names, output_names
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.pytorch import TorchSession

PROMPTS = ["the good dog", "你好"]


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> torch.nn.Module:
    return loading.load_model(checkpoint)


def call(model: torch.nn.Module, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return run_tensors(TorchSession(model), flat)


def test_names_and_shapes_are_those_of_the_specification(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    flat = example_inputs(checkpoint, 3, 2, 5)
    assert list(flat) == input_names(2) and len(input_names(28)) == 59
    assert flat["input_ids"].shape == (3, 2) and flat["position_ids"].shape == (3, 2, 2)
    assert flat["attention_mask"].shape == (3, 1, 2, 7) and flat["attention_mask"].dtype == torch.bool
    assert flat["past_key_values.1.value"].shape == (5, 3, 4, 16)
    outputs = call(model, flat)
    assert list(outputs) == output_names(2)
    assert outputs["present.0.key"].shape == (7, 3, 4, 16)


def test_prompt_positions_and_mask_equal_the_models_own(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    ids = load_tokenizer(checkpoint).encode(PROMPTS[0])
    flat = prompt_inputs(checkpoint, [ids])
    c = ids.index(checkpoint.config["bos_token_id"])
    assert flat["position_ids"][0, 0].tolist() == [*range(c), c - 1]  # the position stays at [gMASK]
    assert flat["position_ids"][0, 1].tolist() == [0] * c + [1]
    assert torch.equal(flat["attention_mask"], model.get_masks(flat["input_ids"], device="cpu"))
    with torch.no_grad():
        own = model(input_ids=flat["input_ids"], use_cache=True, return_dict=False)[0]
    assert torch.equal(own, call(model, flat)["logits"])


def test_past_none_and_past_of_length_zero_are_bit_identical(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    flat = prompt_inputs(checkpoint, [load_tokenizer(checkpoint).encode(PROMPTS[0])])
    without = {name: tensor for name, tensor in flat.items() if not name.startswith("past")}
    assert forward_kwargs(without)["past_key_values"] is None
    with_zero, with_none = call(model, flat), call(model, without)
    assert all(torch.equal(with_zero[name], with_none[name]) for name in with_none)


def test_first_generated_token_has_block_position_two(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    flat = prompt_inputs(checkpoint, [load_tokenizer(checkpoint).encode(PROMPTS[0])])
    following = next_inputs(flat, call(model, flat), torch.tensor([7]))
    assert following["position_ids"][0].tolist() == [[flat["input_ids"].shape[1] - 2], [2]]
    assert not following["attention_mask"].any()


def test_left_padded_batch_answers_as_single_prompts(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    batch = prompt_inputs(checkpoint, prompts)
    assert batch["input_ids"][1, 0] == checkpoint.config["pad_token_id"]
    assert batch["position_ids"][1, :, 0].tolist() == [0, 0] and batch["attention_mask"][1, 0, -1, 0]
    outputs = call(model, batch)
    tokens = torch.tensor([11, 12])
    second = call(model, next_inputs(batch, outputs, tokens))
    for row, prompt in enumerate(prompts):
        single = prompt_inputs(checkpoint, [prompt])
        alone = call(model, single)
        assert torch.allclose(outputs["logits"][row, -1], alone["logits"][0, -1], atol=1e-5)
        after = call(model, next_inputs(single, alone, tokens[row : row + 1]))
        assert torch.allclose(second["logits"][row, -1], after["logits"][0, -1], atol=1e-5)


def test_prefill_in_two_calls_is_consistent_with_example_masks(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    whole = prompt_inputs(checkpoint, [[20, 21, 22, checkpoint.config["gmask_token_id"],
                                              checkpoint.config["bos_token_id"], 30, 31]])  # fmt: skip
    expected = call(model, whole)["logits"][0, -1]
    prompt = {name: tensor for name, tensor in whole.items() if name.startswith("past")}
    first = call(model, prompt | {
        "input_ids": whole["input_ids"][:, :4],
        "position_ids": whole["position_ids"][:, :, :4],
        "attention_mask": whole["attention_mask"][:, :, :4, :4],
    })  # fmt: skip
    example = example_inputs(checkpoint, 1, 3, 4)
    past = {name.replace("present", "past_key_values"): t for name, t in first.items() if name != "logits"}
    tail = {"input_ids": whole["input_ids"][:, 4:]}
    second = call(model, example | past | tail)
    assert torch.allclose(second["logits"][0, -1], expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 1, 0), (1, 0, 3), (1, 1, -1), (1, 600, 500)])
def test_impossible_shapes_are_refused(checkpoint: Checkpoint, shape: tuple[int, int, int]) -> None:
    with pytest.raises(WorkbookError, match="is no input of"):
        example_inputs(checkpoint, *shape)


def test_prompt_without_gmask_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(WorkbookError, match=r"\[gMASK\]"):
        prompt_inputs(checkpoint, [[20, 21]])


def test_record_sees_every_call_and_removes_its_hook(
    checkpoint: Checkpoint, model: torch.nn.Module, tiny_random: Path
) -> None:
    ids = load_tokenizer(checkpoint).encode(PROMPTS[0])
    with pytest.raises(RuntimeError, match="a chat that broke"), recording.record(model) as calls:
        greedy(TorchSession(model), checkpoint, ids, max_length=len(ids) + 4)
        raise RuntimeError("a chat that broke")
    assert [call.kind for call in calls] == ["prefill", "decode", "decode", "decode"]
    assert [call.past for call in calls] == [0, len(ids), len(ids) + 1, len(ids) + 2]
    assert calls[2].position_ids == [[[len(ids) - 2], [3]]]
    seen = len(calls)
    call(model, example_inputs(checkpoint, 1, 2, 0))
    assert len(calls) == seen

    axes = recording.dynamic_axes(calls)
    assert axes["input_ids"] == [1] and axes["attention_mask"] == [2, 3] and axes["past_key_values.0.key"] == [0]
    private = open_checkpoint(tiny_random)
    recording.save_record(private, calls)
    assert recording.load_record(private) == calls


def test_missing_record_names_the_notebook(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    with pytest.raises(WorkbookError, match="01_debug_forward_inputs"):
        recording.load_record(checkpoint)
    with pytest.raises(WorkbookError, match="no call"):
        recording.save_record(checkpoint, [])
