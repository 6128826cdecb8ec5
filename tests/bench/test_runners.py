"""Runners: steps of the requested shapes, run many times, on a CPU and on a fake GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fake_gpu
from support.checkpoints import replace_once
from support.exporting import exported_copy

from glmtrt_helpers.bench import runners
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.inputs import positions_and_mask


def test_step_inputs_are_those_of_a_chat(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    prompt = runners.step_inputs(checkpoint, 2, 6, 0)
    assert prompt["input_ids"].shape == (2, 6) and prompt["attention_mask"].shape == (2, 1, 6, 6)
    decode = runners.step_inputs(checkpoint, 2, 1, 6)
    same = positions_and_mask.decode(prompt, np.array([6, 6]))
    assert all(np.array_equal(decode[name], same[name]) for name in same)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-eager", "ort-cpu"])
def test_runners_on_a_cpu(tmp_path: Path, name: str) -> None:
    checkpoint = exported_copy(tmp_path)
    made = runners.runners(checkpoint, "fp16")
    assert list(made) == ["torch-eager", "torch-graph", "torch-compile", "ort-cpu", "classical", "cuda"]
    runner = made[name]()
    assert runner.name == name and runner.gpu_bytes is None
    for batch, length, past in ((1, 1, 20), (2, 9, 0)):
        step = runner.step(batch, length, past)
        first: Any = step()
        second: Any = step()
        outs: list[Any] = [out.copy_outputs_to_cpu() if name == "ort-cpu" else out for out in (first, second)]
        logits = [np.asarray(out[0]) for out in outs]
        assert logits[0].shape == (batch, length, checkpoint.vocab_size) and np.array_equal(*logits)
        assert len(times := runner.times(step, 3)) == 3 and min(times) > 0
    runner.close()


def test_a_source_that_fails_while_it_is_measured_is_one_sentence(tiny_random: Path) -> None:
    code = tiny_random / "modeling_chatglm.py"
    line = "        hidden_states = inputs_embeds.transpose(0, 1)"
    replace_once(code, line, f"        self.no_such\n{line}")
    step = runners.runners(open_checkpoint(tiny_random), "fp32")["torch-eager"]().step(1, 3, 0)
    with pytest.raises(WorkbookError, match=r"modeling_chatglm\.py, line \d+: the remote code fails here"):
        step()


def test_a_runner_that_needs_a_gpu_is_refused_without(tmp_path: Path) -> None:
    made = runners.runners(exported_copy(tmp_path), "fp16")
    needs = {"torch-graph": "CUDA graphs need", "torch-compile": "CUDA graphs need", "classical": "no GPU"}
    for name, says in (needs | {"cuda": "the one-kernel engine"}).items():
        with pytest.raises(WorkbookError, match=says):
            made[name]()


@pytest.fixture
def built(tmp_path: Path) -> Checkpoint:
    checkpoint = exported_copy(tmp_path)
    profiles = chat_profiles(checkpoint, Range(1, 1, 2), Range(1, 20, 200), Range(1, 100, 300))
    build_engine(checkpoint, "fp16", profiles)
    return checkpoint


@pytest.mark.slow
def test_the_engine_on_a_fake_gpu(built: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step can be run any number of times, at any past."""
    gpu = fake_gpu.install(monkeypatch)
    made = runners.runners(built, "fp16")
    assert "ort-cuda" in made
    runner = made["classical"]()
    assert runner.name == "classical" and runner.gpu_bytes
    assert len(runner.plans()) == 1 and all(plan.exists() for plan in runner.plans())
    for batch, length, past in ((1, 1, 20), (2, 1, 300), (1, 150, 0), (2, 5, 0)):
        step = runner.step(batch, length, past)
        for _ in range(4):
            assert runner.times(step, 1) == [2.0]
    with pytest.raises(WorkbookError, match="outside every profile"):
        runner.step(1, 1, 301)()
    runner.close()
    assert not gpu.blocks
