"""The session of the fast engine on a fake GPU; on a real one it is tried in tests/engines/test_session_on_gpu.py."""

from collections.abc import Iterator

import numpy as np
import pytest
from support import fake_gpu
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.memory_prediction import engine_weights
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.export import exporting
from glmtrt_helpers.fast import backends as fast_backends
from glmtrt_helpers.fast import session as fast_session
from glmtrt_helpers.fast import tensorrt as fast_tensorrt
from glmtrt_helpers.fast.decoder import build_fast, export_fast
from glmtrt_helpers.fast.tensorrt import AHEAD, FastTensorRTSession
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.graphs.reference import CASES
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.decode_loop import generate, greedy

BATCH = Range(1, 2, 4)


def prepare(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    export_fast(checkpoint, dtype)
    build_fast(checkpoint, dtype, chat_profiles(checkpoint, BATCH))
    return checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Random weights, 300 positions: eight blocks of the attention at most, in rows of 32 bytes."""
    directory = make_random(tmp_path_factory.mktemp("small") / "chatglm_random", max_sequence_length=300)
    patching.patch_checkpoint(directory)
    exporting.export_model(open_checkpoint(directory), "fp16")
    return prepare(open_checkpoint(directory), "fp16")


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
    tokenizer = load_tokenizer(checkpoint)
    return [tokenizer.encode("the good dog " * count) for count in counts]


def test_memory_is_the_weights_and_one_cache(small: Checkpoint, session: FastTensorRTSession) -> None:
    """At the real size that is 12.4 and 0.94 GB, and a second of either would be felt."""
    numbers = 2 * small.num_layers * BATCH.max * small.num_heads * 300 * small.head_size  # 300 tokens end at 256 bytes
    assert session.measured.cache == 2 * numbers
    assert session.measured.weights == pytest.approx(engine_weights(small, "fp16"), abs=256 * 40)
    assert len({place.address for place in session._places.values()}) == len(session._places)


def test_a_vocabulary_matrix_that_is_stored_twice_is_held_once(
    small: Checkpoint, session: FastTensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of samples alone is not enough; the numbers decide."""
    monkeypatch.setattr(fast_session, "shares_vocabulary", lambda checkpoint: True)
    (first, second), read = fast_session.VOCABULARY, fast_session.read_weight

    def read_same(checkpoint: Checkpoint, name: str, dtype: np.dtype) -> np.ndarray:
        return read(checkpoint, first if name == second else name, dtype)

    for same in (False, True):
        if same:
            monkeypatch.setattr(fast_session, "read_weight", read_same)
        opened = FastTensorRTSession.open(small)
        assert len({place.address for place in opened._places.values()}) == len(opened._places) - same
        opened.close()


def test_a_chat_up_to_the_last_position_feeds_itself(
    small: Checkpoint, session: FastTensorRTSession, gpu: fake_gpu.FakeCuda
) -> None:
    """A padded batch from 115 tokens on: ONNX Runtime's tokens, from a graph for 128, 256 and 512 tokens each."""
    batch = prompts(small, 11, 3)
    assert 100 < len(batch[0]) < 128
    wanted = fast_backends.open_session(small, "ort")
    assert list(generate(session, small, batch)) == list(generate(wanted, small, batch))
    assert session.past == 300 and set(session._graphs) == {(2, 128), (2, 256), (2, 512)}
    steps = 300 - len(batch[0])  # the last of them ran ahead and nobody waited for it
    assert gpu.launches == steps - 3, "all but the first step of each number of blocks ran as a graph"
    # Another prompt, in graphs that are there already; what was in the cache is hidden.
    one = prompts(small, 2)
    assert list(generate(session, small, one)) == list(generate(wanted, small, one))
    gpu.launches = 0
    assert list(generate(session, small, batch)) == list(generate(wanted, small, batch))
    assert gpu.launches == steps


def test_padding_stays_hidden_when_steps_feed_themselves(
    small: Checkpoint, session: FastTensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights choose the same tokens with and without padding; their logits tell."""
    monkeypatch.setattr(fast_tensorrt, "AHEAD", 0)
    wanted = fast_backends.open_session(small, "ort")
    call = positions_and_mask.prefill(small, prompts(small, 11, 3))
    session.step(call)
    steps = session.follow()
    for _ in range(30):
        token = next(steps)
        right = wanted.step(call)
        assert np.array_equal(session._read_output("logits", right.shape).astype(np.float32), right)
        call = positions_and_mask.decode(call, token)
    steps.close()


def test_steps_from_the_host(small: Checkpoint, session: FastTensorRTSession) -> None:
    """Without `follow`, as sampling decodes: the host chooses, each step's logits are those of ONNX Runtime."""
    wanted = fast_backends.open_session(small, "ort")
    batch = prompts(small, 20, 27)
    call = positions_and_mask.prefill(small, batch)
    for _ in range(4):
        got, right = session.step(call), wanted.step(call)
        assert np.array_equal(got, right) and session.past == wanted.past  # type: ignore[attr-defined]
        call = positions_and_mask.decode(
            call, right.argsort(axis=-1)[:, -2]
        )  # the second best: not what the graph would feed


def test_every_case_the_profiles_take(small: Checkpoint, session: FastTensorRTSession) -> None:
    """A past from the host, long ones and padded; logits and presents against PyTorch."""
    cases = [case for case in CASES if case.past == 0 or case.sequence == 1]
    result = verification.verify(small, "fp16", cases, session=session)
    assert len(result.rows) == 8 and all(row.ok for row in result.rows), result.rows


def test_stopping_midway_and_again(small: Checkpoint, session: FastTensorRTSession) -> None:
    """Steps that run ahead of a reader who stops are no harm to the next prompt."""
    steps = generate(session, small, prompts(small, 1))
    for _ in range(3):
        next(steps)
    length = len(prompts(small, 1)[0])
    assert length + 2 <= session.past <= length + 2 + AHEAD
    steps.close()
    wanted = fast_backends.open_session(small, "ort")
    again = prompts(small, 2)
    assert greedy(session, small, again[0], max_length=60) == greedy(wanted, small, again[0], max_length=60)


def test_what_does_not_fit(small: Checkpoint, session: FastTensorRTSession, gpu: fake_gpu.FakeCuda) -> None:
    with pytest.raises(WorkbookError, match=r"batch 5, .* outside every profile"):
        session.step(positions_and_mask.prefill(small, prompts(small, 1, 1, 1, 1, 1)))
    with pytest.raises(WorkbookError, match="outside every profile"):
        session.step(positions_and_mask.prefill(small, prompts(small, 1, 1)))
        session.step(
            positions_and_mask.prefill(small, prompts(small, 1, 1))
        )  # a chunk on a past is in no profile of a chat
    blocks = dict(gpu.blocks)
    gpu.blocks[0] = np.empty(fake_gpu.MEMORY, np.uint8)
    with pytest.raises(WorkbookError, match="the GPU has not enough memory to hold the weights"):
        FastTensorRTSession.open(small)
    assert set(gpu.blocks) == {0, *blocks}, "what was taken before it came out is given back"
    gpu.blocks = blocks


def test_an_engine_that_is_missing(small: Checkpoint) -> None:
    with pytest.raises(WorkbookError, match=r"model.fp32.fast.first.plan is missing.*--fast"):
        FastTensorRTSession.open(small, "fp32")
