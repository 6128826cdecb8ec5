"""Names and order of inputs and outputs, which are those of the model's forward, and their dynamic axes."""

from pathlib import Path

import numpy as np

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.inputs.examples import example_inputs, prompt_inputs
from glmtrt_helpers.inputs.names import axis_names, forward_kwargs, input_names, output_names, past_from
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_names_and_axes_are_those_that_forward_takes_and_returns(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    sizes = {"batch": 3, "sequence": 2, "past": 5, "total": 7}
    flat = example_inputs(checkpoint, sizes["batch"], sizes["sequence"], sizes["past"])
    outputs = TorchSession(loading.load_model(checkpoint)).run(flat)
    assert list(flat) == input_names(2) and len(input_names(28)) == 59
    assert list(outputs) == output_names(2) and len(output_names(28)) == 57
    for name, tensor in {**flat, **outputs}.items():
        dynamic = {axis: sizes[axis_name] for axis, axis_name in axis_names(name).items()}
        assert dynamic and dynamic == {axis: tensor.shape[axis] for axis in dynamic}, name
    assert axis_names("transformer.layers.0.softmax") == {}


def test_the_presents_of_one_call_are_the_past_of_the_next() -> None:
    outputs = {"logits": 0, "present.0.key": 1, "present.0.value": 2, "softmax": 3}
    assert past_from(outputs) == {"past_key_values.0.key": 1, "past_key_values.0.value": 2}


def test_past_none_and_past_of_length_zero_are_bit_identical(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    session = TorchSession(loading.load_model(checkpoint))
    gmask, sop = checkpoint.config["gmask_token_id"], checkpoint.config["bos_token_id"]
    flat = prompt_inputs(checkpoint, [[20, 21, gmask, sop]])
    without = {name: tensor for name, tensor in flat.items() if not name.startswith("past")}
    assert forward_kwargs(without)["past_key_values"] is None
    with_zero, with_none = session.run(flat), session.run(without)
    assert all(np.array_equal(with_zero[name], with_none[name]) for name in with_none)
