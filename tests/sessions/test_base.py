"""What every session does: `step` keeps the cache that `run` returns."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exporting import exported_copy
from support.scripted import Scripted

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.fast.cuda_session import CudaSession
from glmtrt_helpers.inputs.names import past_from
from glmtrt_helpers.inputs.positions_and_mask import decode, prefill
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import OrtSession, SlicedOrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession

KINDS = (TorchSession, OrtSession, SlicedOrtSession, TensorRTSession, CudaSession)


def test_stepping_equals_running(tmp_path: Path) -> None:
    """The cache that a session keeps is the one that run returns: torch and ort, prefill, decode, reset."""
    checkpoint = exported_copy(tmp_path)
    prompts = [load_tokenizer(checkpoint).encode(text) for text in ("the good dog", "a")]
    for backend in ("torch", "ort"):
        session = backends.open_session(checkpoint, backend, "fp32")
        assert session.backend == backend and session.dtype == np.float32
        call, past = prefill(checkpoint, prompts), session.empty_past(2)
        for tokens in ([20, 21], [22, 23]):
            outputs = session.run({**call, **past})
            np.testing.assert_array_equal(session.step(call), outputs["logits"][:, -1])
            past = past_from(outputs)
            call = decode(call, np.array(tokens))
        session.reset()
        again = prefill(checkpoint, prompts)
        np.testing.assert_array_equal(
            session.step(again), session.run({**again, **session.empty_past(2)})["logits"][:, -1]
        )


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(call).result()


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_refuses_a_second_thread_and_a_closed_session(kind: type[Session]) -> None:
    """Without opening one: the refusal comes before a method looks at what it needs."""
    session = kind.__new__(kind)
    methods = [name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))]
    methods = [name for name in methods if name not in ("alone", "open", "check")]
    assert {"run", "step", "reset", "empty_past", "follow", "close"} <= set(methods)
    with session.alone():
        for name in methods:
            with pytest.raises(WorkbookError, match="another thread is using this session"):
                in_another_thread(getattr(session, name))
    session._closed = True
    for name in set(methods) - {"close"}:
        with pytest.raises(WorkbookError, match="this session was closed"):
            getattr(session, name)()
    session.close()


def test_a_session_is_used_by_threads_in_turn_and_closed_once(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    session = Scripted(checkpoint, [7, 8])
    call = prefill(checkpoint, [load_tokenizer(checkpoint).encode("a")])
    assert session.step(call).argmax() == 7
    assert in_another_thread(lambda: session.step(decode(call, np.array([7])))).argmax() == 8
    with pytest.raises(StopIteration):  # whatever fails in a method lets the next one in
        session.step(call)
    assert in_another_thread(lambda: session.reset()) is None
    session.close()
    session.close()
    with pytest.raises(WorkbookError, match="this session was closed"):
        session.step(call)
