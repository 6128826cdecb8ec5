"""The full depth and width on a GPU: GLMTRT_LARGE names a working copy of 6.7 billion numbers with its fp16 engine.

glmtrt standin models/chatglm_6b_random --size 6b && glmtrt copy models/chatglm_6b_random
glmtrt bench memory models/run/chatglm_6b_random --phase patch --phase export --phase build
GLMTRT_LARGE=models/run/chatglm_6b_random python -m pytest tests/test_real_size.py
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from glmtrt_helpers import bench, checkpoints, feeds, plans, profiles, references, runtime, verification
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.tensorrt_session import TensorRTSession

LARGE = os.environ.get("GLMTRT_LARGE", "")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not LARGE, reason="GLMTRT_LARGE names no working copy")]
# What the two profiles of a chat take.
CASES = [case for case in references.CASES if case.batch == 1 and (case.past == 0 or case.sequence == 1)]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    opened = checkpoints.open_checkpoint(LARGE)
    assert opened.num_layers == 28 and opened.weight_bytes > 13e9
    return opened


@pytest.fixture(scope="module")
def session(checkpoint: Checkpoint) -> Iterator[TensorRTSession]:
    opened = TensorRTSession.open(checkpoint)
    yield opened
    opened.close()


def keep(name: str, **content: object) -> None:
    kept = {**bench.machine(), **content}
    print(json.dumps(content))
    if "GLMTRT_KEEP" in os.environ:
        Path(os.environ["GLMTRT_KEEP"], name).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def test_predicted_memory_is_what_is_taken(checkpoint: Checkpoint, session: TensorRTSession) -> None:
    info = plans.read_info(plans.plan_path(checkpoint, "fp16"))
    predicted, measured = profiles.predict_memory(checkpoint, info.profiles), session.measured
    keep("memory_6b.json", predicted=asdict(predicted), measured=asdict(measured), build_seconds=info.seconds)
    assert measured.total == pytest.approx(predicted.total, rel=0.05)
    assert measured.weights == pytest.approx(predicted.weights, rel=0.05)
    assert measured.cache == pytest.approx(predicted.cache, rel=0.05)


def test_decode_and_prefill_run(checkpoint: Checkpoint, session: TensorRTSession) -> None:
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    prompt = feeds.chat_prompt(tokenizer, "你好")
    started = time.perf_counter()
    answer = runtime.greedy(session, checkpoint, prompt, max_length=len(prompt) + 64)
    seconds = time.perf_counter() - started
    again = runtime.greedy(session, checkpoint, prompt, max_length=len(prompt) + 64)
    assert answer == again and len(answer) > 1
    keep("chat_6b.json", tokens=len(answer), seconds=seconds)
    session.reset()
    with pytest.raises(WorkbookError, match="outside every profile"):
        session.step(feeds.prefill(checkpoint, [prompt] * 2))


def test_error_at_full_depth_against_fp32(checkpoint: Checkpoint, session: TensorRTSession) -> None:
    """At most 1.5 times PyTorch fp16's own error, at logits and every present."""
    result = verification.verify(checkpoint, "fp16", CASES, session=session)
    rows = [{"case": row.case.name, "tensor": row.tensor, "error": row.error, "allowed": row.tolerance,
             "pytorch_fp16": row.own_error} for row in result.rows]  # fmt: skip
    keep("verify_6b.json", rows=rows, problems=result.problems)
    assert result.ok, rows
