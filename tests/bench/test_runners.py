"""What the bench measures: steps of the shapes asked for, again and again, on a CPU and on a GPU that is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fake_gpu
from support.exporting import exported_copy

from glmtrt_helpers.bench import runners
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.fast.decoder import build_fast, export_fast
from glmtrt_helpers.inputs import positions_and_mask


def test_a_call_is_what_a_chat_sends(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    prompt = runners.call(checkpoint, 2, 6, 0)
    assert prompt["input_ids"].shape == (2, 6) and prompt["attention_mask"].shape == (2, 1, 6, 6)
    decode = runners.call(checkpoint, 2, 1, 6)
    same = positions_and_mask.decode(prompt, np.array([6, 6]))
    assert all(np.array_equal(decode[name], same[name]) for name in same)


@pytest.mark.parametrize("name", ["torch-eager", "ort-cpu"])
def test_on_a_cpu(tmp_path: Path, name: str) -> None:
    checkpoint = exported_copy(tmp_path)
    made = runners.runners(checkpoint, "fp16")
    assert list(made) == ["torch-eager", "torch-graph", "ort-cpu", "classical", "fast"]
    contender = made[name]()
    assert contender.name == name and contender.taken is None
    for batch, length, past in ((1, 1, 20), (2, 9, 0)):
        step = contender.step(batch, length, past)
        first: Any = step()
        second: Any = step()
        outs: list[Any] = [out.copy_outputs_to_cpu() if name == "ort-cpu" else out for out in (first, second)]
        logits = [np.asarray(out[0]) for out in outs]
        assert logits[0].shape == (batch, length, checkpoint.vocab_size) and np.array_equal(*logits)
        assert len(taken := contender.times(step, 3)) == 3 and min(taken) > 0
    contender.close()


def test_what_needs_a_gpu_says_so(tmp_path: Path) -> None:
    made = runners.runners(exported_copy(tmp_path), "fp16")
    for name, says in (("torch-graph", "CUDA graphs need"), ("classical", "is missing"), ("fast", "--fast")):
        with pytest.raises(WorkbookError, match=says):
            made[name]()


@pytest.fixture
def built(tmp_path: Path) -> Checkpoint:
    checkpoint = exported_copy(tmp_path)
    export_fast(checkpoint, "fp16")
    boxes = chat_profiles(checkpoint, Range(1, 1, 2), Range(1, 20, 200), Range(1, 100, 300))
    build_engine(checkpoint, "fp16", boxes)
    build_fast(checkpoint, "fp16", boxes)
    return checkpoint


def test_both_engines_on_a_gpu_that_is_none(built: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step can be run any number of times, at any past, and the cache is where it was."""
    gpu = fake_gpu.install(monkeypatch)
    made = runners.runners(built, "fp16")
    assert "ort-cuda" in made
    for name in ("classical", "fast"):
        contender = made[name]()
        assert contender.name == name and contender.taken
        assert len(contender.plans()) == (4 if name == "fast" else 1) and all(
            plan.exists() for plan in contender.plans()
        )
        for batch, length, past in ((1, 1, 20), (2, 1, 300), (1, 150, 0), (2, 5, 0)):
            step = contender.step(batch, length, past)
            for _ in range(4):
                assert contender.times(step, 1) == [2.0]
            if name == "fast":
                assert contender.session.past == past + length  # type: ignore[attr-defined]
                if past:
                    assert contender.times(step, 3) == [2.0] * min(3, 301 - past)
        with pytest.raises(WorkbookError, match=r"outside every profile|more than the 301"):
            contender.step(1, 1, 301)()
        contender.close()
        assert not gpu.blocks
    # Of four decode steps at each past all but the first ran as a graph; of three more as many as there is room for.
    assert gpu.launches == 2 * 3 + 3 + 1
