"""What every session does: `step` keeps the cache that `run` returns."""

from pathlib import Path

import numpy as np
from support.exporting import exported_copy

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs.names import past_from
from glmtrt_helpers.inputs.positions_and_mask import decode, prefill


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
