"""The session of the fast engine on a GPU that is none (`fake_gpu`); on a real one test_tensorrt_session tries it."""

from collections.abc import Iterator

import fake_gpu
import numpy as np
import pytest
from conftest import make_random

from glmtrt_helpers import (
    checkpoints,
    engines,
    export,
    fast,
    fast_tensorrt,
    feeds,
    profiles,
    references,
    runtime,
    verification,
)
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.fast_tensorrt import AHEAD, FastTensorRTSession
from glmtrt_helpers.profiles import Range

BATCH = Range(1, 2, 4)


def prepare(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    fast.export_fast(checkpoint, dtype)
    boxes = profiles.chat_profiles(checkpoint, BATCH)
    engines.build_engine(checkpoint, dtype, boxes, onnx_path=export.onnx_path(checkpoint, dtype, fast=True))
    return checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random weights, 300 positions: three chunks. Rows of 32 bytes, which leave addresses to be aligned."""
    directory = make_random(tmp_path_factory.mktemp("small") / "chatglm_random", max_sequence_length=300)
    return prepare(checkpoints.open_checkpoint(directory), "fp16")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> fake_gpu.FakeCuda:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def session(small: Checkpoint, gpu: fake_gpu.FakeCuda) -> Iterator[FastTensorRTSession]:
    opened = FastTensorRTSession.open(small)
    yield opened
    opened.close()
    assert not gpu.blocks, "all memory was given back"


def prompts(checkpoint: Checkpoint, *counts: int) -> list[list[int]]:
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    return [tokenizer.encode("the good dog " * count) for count in counts]


def test_memory_is_one_cache_and_one_set_of_new_rows(small: Checkpoint, session: FastTensorRTSession) -> None:
    """At the real size that is 2 x 0.94 GB, and a byte too many in a row would be a GB."""
    numbers = 2 * small.num_layers * BATCH.max * small.num_heads * small.head_size
    assert session._buffers["new"].nbytes == 2 * numbers * 299  # the longest prompt
    assert session.measured.cache == pytest.approx(2 * numbers * 3 * 128, abs=2**20)


def test_a_chat_over_three_chunks_feeds_itself(
    small: Checkpoint, session: FastTensorRTSession, gpu: fake_gpu.FakeCuda
) -> None:
    """A padded batch from 115 tokens to the last position: ONNX Runtime's tokens, from graphs captured once a chunk."""
    batch = prompts(small, 11, 3)
    assert 100 < len(batch[0]) < 128
    wanted = runtime.open_session(small, "ort", fast=True)
    assert list(runtime.generate(session, small, batch)) == list(runtime.generate(wanted, small, batch))
    assert session.past == 300 and len(session._graphs) == 3
    steps = 300 - len(batch[0])  # the last of them ran ahead and nobody waited for it
    assert gpu.launches == steps - 3, "all but the first step of each chunk ran as a graph"
    assert gpu.copies == 1 + steps, "new rows of all layers went into the cache at once"
    # Another prompt, in graphs that are there already; what was in the cache is hidden.
    one = prompts(small, 2)
    assert list(runtime.generate(session, small, one)) == list(runtime.generate(wanted, small, one))
    gpu.launches = 0
    assert list(runtime.generate(session, small, batch)) == list(runtime.generate(wanted, small, batch))
    assert gpu.launches == steps


def test_padding_stays_hidden_when_steps_feed_themselves(
    small: Checkpoint, session: FastTensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights choose the same tokens with and without padding; their logits tell."""
    monkeypatch.setattr(fast_tensorrt, "AHEAD", 0)
    wanted = runtime.open_session(small, "ort", fast=True)
    call = feeds.prefill(small, prompts(small, 11, 3))
    session.step(call)
    steps = session.follow()
    for _ in range(30):
        token = next(steps)
        right = wanted.step(call)
        assert np.array_equal(session._read("logits", right.shape).astype(np.float32), right)
        call = feeds.decode(call, token)
    steps.close()


def test_a_prompt_of_several_chunks_and_steps_from_the_host(small: Checkpoint, session: FastTensorRTSession) -> None:
    """Without `follow`, as sampling decodes: the host chooses, each step's logits are those of ONNX Runtime."""
    wanted = runtime.open_session(small, "ort", fast=True)
    batch = prompts(small, 20, 27)
    call = feeds.prefill(small, batch)
    for _ in range(4):
        got, right = session.step(call), wanted.step(call)
        assert np.array_equal(got, right) and session.past == wanted.past  # type: ignore[attr-defined]
        call = feeds.decode(call, right.argsort(axis=-1)[:, -2])  # the second best: not what the graph would feed


def test_every_case_the_profiles_take(small: Checkpoint, session: FastTensorRTSession) -> None:
    """A past from the host, over chunks and padded; logits and presents against PyTorch."""
    cases = [case for case in references.CASES if case.past == 0 or case.sequence == 1]
    result = verification.verify(small, "fp16", cases, export.onnx_path(small, "fp16", fast=True), session)
    assert len(result.rows) == 8 and all(row.ok for row in result.rows), result.rows


def test_stopping_midway_and_again(small: Checkpoint, session: FastTensorRTSession) -> None:
    """Steps that run ahead of a reader who stops are no harm to the next prompt."""
    steps = runtime.generate(session, small, prompts(small, 1))
    for _ in range(3):
        next(steps)
    length = len(prompts(small, 1)[0])
    assert length + 2 <= session.past <= length + 2 + AHEAD
    steps.close()
    wanted = runtime.open_session(small, "ort", fast=True)
    again = prompts(small, 2)
    assert runtime.greedy(session, small, again[0], max_length=60) == runtime.greedy(
        wanted, small, again[0], max_length=60
    )


def test_what_does_not_fit(small: Checkpoint, session: FastTensorRTSession, gpu: fake_gpu.FakeCuda) -> None:
    with pytest.raises(WorkbookError, match=r"batch 5, .* outside every profile"):
        session.step(feeds.prefill(small, prompts(small, 1, 1, 1, 1, 1)))
    with pytest.raises(WorkbookError, match="outside every profile"):
        session.step(feeds.prefill(small, prompts(small, 1, 1)))
        session.step(feeds.prefill(small, prompts(small, 1, 1)))  # a chunk on a past is in no profile of a chat
    blocks = dict(gpu.blocks)
    gpu.blocks[0] = np.empty(fake_gpu.MEMORY, np.uint8)
    with pytest.raises(WorkbookError, match="the GPU has not enough memory to hold the new rows"):
        FastTensorRTSession.open(small)
    gpu.blocks = blocks


def test_an_engine_that_is_missing(small: Checkpoint) -> None:
    with pytest.raises(WorkbookError, match=r"model.fp32.fast.plan is missing.*--fast"):
        FastTensorRTSession.open(small, "fp32")
