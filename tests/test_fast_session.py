"""The session over chunks: where rows go, what is hidden, and that a chat cannot tell it from the classical one."""

from pathlib import Path

import numpy as np
import pytest

from glmtrt_helpers import checkpoints, export, fast, fast_session, feeds, runtime
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    opened = checkpoints.open_checkpoint(checkpoints.working_copy(_random_master, tmp_path_factory.mktemp("run")))
    fast.export_fast(opened, "fp32")
    return opened


def test_pieces_cover_every_row_once() -> None:
    assert fast_session.pieces(0, 4) == [(0, slice(0, 4), slice(0, 4))]
    assert fast_session.pieces(126, 1) == [(0, slice(126, 127), slice(0, 1))]
    assert fast_session.pieces(128, 1) == [(1, slice(0, 1), slice(0, 1))]
    for past, length in ((0, 128), (100, 60), (127, 2), (120, 300), (256, 129)):
        rows = [128 * chunk + row for chunk, there, _ in fast_session.pieces(past, length)
                for row in range(there.start, there.stop)]  # fmt: skip
        new = [row for _, _, here in fast_session.pieces(past, length) for row in range(here.start, here.stop)]
        assert rows == list(range(past, past + length)) and new == list(range(length))
    assert [fast_session.chunks_of(n) for n in (0, 1, 128, 129, 256)] == [1, 1, 1, 2, 2]


def test_the_mask_is_split_into_new_and_visible(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    call = feeds.prefill(checkpoint, [tokenizer.encode("a"), tokenizer.encode("the good dog")])
    among, visible = fast_session.split_mask(call, 0)
    assert (among == call["attention_mask"]).all() and visible[1].tolist() == [0, 0]
    length = call["input_ids"].shape[1]
    assert visible[0].tolist() == [length - len(tokenizer.encode("a")), 0], "padding is known before it is cached"
    among, visible = fast_session.split_mask(feeds.decode(call, np.array([7, 8])), length)
    assert among.shape == (2, 1, 1, 1) and not among.any()
    assert visible.tolist() == [[length - len(tokenizer.encode("a")), length], [0, length]]
    hole = feeds.decode(call, np.array([7, 8]))
    hole["attention_mask"][1, 0, 0, 1] = True
    with pytest.raises(WorkbookError, match="hides nothing of the cache but padding"):
        fast_session.split_mask(hole, length)


def test_a_long_batch_is_the_classical_one_across_chunks(checkpoint: Checkpoint) -> None:
    """Left-padded prompts of 120 and 60 tokens and 20 answers' tokens: the cache passes from one chunk to the next."""
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("the good dog " * count) for count in (11, 4)]
    assert 100 < len(prompts[0]) < 128 < len(prompts[0]) + 28
    wanted = runtime.TorchSession(checkpoints.load_model(checkpoint))
    got = runtime.open_session(checkpoint, "ort", "fp32", fast=True)
    length = len(prompts[0]) + 28
    assert list(runtime.generate(got, checkpoint, prompts, max_length=length)) == list(
        runtime.generate(wanted, checkpoint, prompts, max_length=length)
    )
    assert isinstance(got, fast_session.FastSession) and got.past == length - 1
    got.reset()
    assert got.past == 0
    # A second talk finds the rows of the first in its chunks, and does not see them.
    call = feeds.prefill(checkpoint, [prompts[1]])
    wanted.reset()
    assert np.allclose(got.step(call), wanted.step(call), atol=1e-4)


def test_a_cache_that_is_full_or_of_other_rows(checkpoint: Checkpoint) -> None:
    session = runtime.open_session(checkpoint, "ort", "fp32", fast=True)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    call = feeds.prefill(checkpoint, [tokenizer.encode("a")])
    session.step(call)
    with pytest.raises(WorkbookError, match="the cache holds 1 rows, the call has 2"):
        session.step(feeds.prefill(checkpoint, [tokenizer.encode("a")] * 2))
    session.reset()
    session.limits = runtime.Limits(total=len(call["input_ids"][0]))
    session.step(call)
    with pytest.raises(WorkbookError, match=r"\d tokens in the cache and 1 new ones are more than the \d"):
        session.step(feeds.decode(call, np.array([7])))


def test_what_is_missing_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        WorkbookError, match=r"model.fp16.fast.onnx is missing: .*`glmtrt export .*chatglm_random --fast`"
    ):
        runtime.open_session(checkpoint, "ort", "fp16", fast=True)
    with pytest.raises(WorkbookError, match=r"model.fp32.fast.plan is missing.* --dtype fp32 --fast`"):
        runtime.open_session(checkpoint, "tensorrt", "fp32", fast=True)
    with pytest.raises(WorkbookError, match="the fast decoder does not run on torch"):
        runtime.open_session(checkpoint, "torch", "fp32", fast=True)
    assert set(runtime.unavailable(checkpoint, fast=True)) == {"torch", "ort", "tensorrt"}
    assert runtime.best_backend(checkpoint, "fp32", fast=True)[0] == "ort"
    assert not export.onnx_path(checkpoint, "fp16", fast=True).exists()
