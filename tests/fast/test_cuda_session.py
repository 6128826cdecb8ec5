"""The session of the one-kernel engine on any machine: decoder.cu runs on the host, in the host's memory.

Prompts of up to 8 tokens, all rows together; longer ones need cuBLASLt and a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import fake_gpu
from support.host_decoder import HostCard, compile_decoder

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.shards import StoredTensor
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.tensorrt_package import Gpu
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.fast import cuda_session, memory_prediction, products, programs
from glmtrt_helpers.fast.cuda_session import CudaSession
from glmtrt_helpers.fast.memory_prediction import ROWS
from glmtrt_helpers.fast.weights import EMBEDDING, Weights
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.base import Limits
from glmtrt_helpers.sessions.decode_loop import generate
from glmtrt_helpers.sessions.pytorch import TorchSession

BLOCKS = 2


@pytest.fixture(scope="module")
def checkpoint(tiny_run: Path) -> Checkpoint:
    return open_checkpoint(tiny_run)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> TorchSession:
    return TorchSession(loading.load_model(checkpoint))


@pytest.fixture(scope="module")
def sizes_and_program(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> object:
    sizes = programs.sizes_of(checkpoint)
    return compile_decoder(sizes, BLOCKS, tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def session(
    checkpoint: Checkpoint, sizes_and_program: object, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CudaSession]:
    gpu = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(cuda_session, "load_library", lambda: None)
    monkeypatch.setattr(programs, "Card", lambda *_: HostCard(gpu, sizes_and_program, BLOCKS))  # type: ignore[arg-type]
    opened = CudaSession.open(checkpoint)
    yield opened
    opened.close()
    assert not gpu.blocks, "all memory was freed"


def prompts(checkpoint: Checkpoint, *texts: str) -> list[list[int]]:
    tokenizer = load_tokenizer(checkpoint)
    made = [chat_prompt(tokenizer, text) for text in texts]
    assert sum(map(len, made)) <= ROWS and len(set(map(len, made))) == len(made), "short, and the second padded"
    return made


def close(got: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(got - right).max() < 0.01 * np.abs(right).max())


@pytest.mark.slow
def test_tokens_of_padded_rows_are_pytorchs(
    checkpoint: Checkpoint, reference: TorchSession, session: CudaSession
) -> None:
    """A prompt of two rows of different lengths, and the steps after it that feed themselves; then another chat."""
    both = prompts(checkpoint, "谢谢", "a")
    length = max(map(len, both)) + 3
    for some in (both, both[:1]):
        wanted = list(generate(reference, checkpoint, some, max_length=length))
        assert list(generate(session, checkpoint, some, max_length=length)) == wanted
        # A wrong position changes keys long before it changes a token.
        made = [array.swapaxes(0, 1)[: length - 1] for array in session._read()]
        for array, (name, right) in zip(made, reference._cache.items(), strict=True):  # type: ignore[union-attr]
            for row, prompt in enumerate(some):
                skip = max(map(len, some)) - len(prompt)
                assert close(array[skip:, row], np.asarray(right)[skip : length - 1, row]), name
    assert session.card.steps[0] == sum(map(len, both)) and set(session.card.steps[1:5]) == {2}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_scores_and_the_cache_are_pytorchs(
    checkpoint: Checkpoint, reference: TorchSession, session: CudaSession
) -> None:
    """`step` from an empty cache and after one, and `run`, whose past comes from the host."""
    both = prompts(checkpoint, "谢谢", "a")
    padding = [len(both[0]) - len(prompt) for prompt in both]
    call, past = positions_and_mask.prefill(checkpoint, both), reference.empty_past(2)
    reference.reset()
    for _ in range(2):
        given = {**call, **past}
        wanted = reference.run(given)
        got = session.run(
            {name: array.astype(np.float16) if "past" in name else array for name, array in given.items()}
        )
        assert got["logits"].shape == (2, 1, checkpoint.vocab_size)
        assert close(got["logits"], wanted["logits"][:, -1:])
        for name in sorted(set(wanted) - {"logits"}):
            for row, skip in enumerate(padding):  # what padding has in the cache is not kept
                assert close(got[name][skip:, row], wanted[name][skip:, row]), name
        scores = reference.step(call)
        past = {f"past_key_values.{name[8:]}": wanted[name] for name in wanted if name.startswith("present.")}
        call = positions_and_mask.decode(call, scores.argmax(axis=-1))
    first = positions_and_mask.prefill(checkpoint, prompts(checkpoint, "谢谢", "a"))
    reference.reset()
    for call in (first, positions_and_mask.decode(first, np.array([7, 8]))):
        wanted = reference.step(call)
        assert close(session.step(call), wanted)


@pytest.mark.slow
def test_a_cache_of_other_rows_other_padding_or_no_room(checkpoint: Checkpoint, session: CudaSession) -> None:
    call = positions_and_mask.prefill(checkpoint, prompts(checkpoint, "谢谢", "a"))
    session.step(call)
    with pytest.raises(WorkbookError, match="the cache holds 2 rows, the call has 1: reset the session first"):
        session.step(positions_and_mask.prefill(checkpoint, prompts(checkpoint, "a")))
    after = positions_and_mask.decode(call, np.array([7, 8]))
    other = {name: array.copy() for name, array in after.items()}
    assert other["attention_mask"][:, 0, 0, 0].any(), "one of them is padded"
    other["attention_mask"][...] = False
    with pytest.raises(WorkbookError, match="other padding than the call's mask hides: reset the session first"):
        session.step(other)
    session.limits = Limits(total=session.past)
    with pytest.raises(WorkbookError, match=r"\d tokens in the cache and 1 new ones are more than the \d"):
        session.step(after)


@pytest.mark.parametrize(("name", "value"), [("input_ids", -1), ("input_ids", 10**6), ("position_ids", 2048)])
def test_ids_and_positions_that_do_not_exist(
    checkpoint: Checkpoint, session: CudaSession, name: str, value: int
) -> None:
    call = positions_and_mask.prefill(checkpoint, prompts(checkpoint, "a"))
    call[name][..., 0] = value
    with pytest.raises(WorkbookError, match=rf"{name} goes from .* this checkpoint has 0 to"):
        session.step(call)


def test_too_little_memory_is_told_before_any_is_taken(
    checkpoint: Checkpoint, sizes_and_program: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu.install(monkeypatch)
    monkeypatch.setattr(cuda_session, "load_library", lambda: None)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [Gpu("a card that others use", (8, 9), 2 * 10**9)])
    monkeypatch.setattr(fake_gpu, "MEMORY", 4_000_000)
    with pytest.raises(WorkbookError, match=r"take 0\.0 GB, and 0\.0 GB of the GPU are free: close other programs"):
        CudaSession.open(checkpoint)
    assert not gpu.blocks


@pytest.mark.slow
def test_the_memory_that_was_predicted_is_taken(checkpoint: Checkpoint, session: CudaSession) -> None:
    before = cuda.free_device_memory()
    session.step(positions_and_mask.prefill(checkpoint, prompts(checkpoint, "a")))
    session.reset()
    session.step(positions_and_mask.prefill(checkpoint, prompts(checkpoint, "谢谢", "a")))  # the cache grows
    predicted = memory_prediction.predict_memory(checkpoint, rows=2)
    room = 2 * checkpoint.num_layers * checkpoint.max_length * checkpoint.hidden_size * 2
    assert before - cuda.free_device_memory() == predicted.cache == 2 * room, "keys and values of two rows, in fp16"
    assert fake_gpu.MEMORY - cuda.free_device_memory() == pytest.approx(predicted.total, rel=0.1)


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
def test_weights_arrive_as_they_are_stored(
    checkpoint: Checkpoint, tmp_path: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.install(monkeypatch)
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    tensor = torch.randn(3, 5).to(kinds[stored])
    (tmp_path / "shard").write_bytes(b"head" * 3 + tensor.view(torch.uint8).numpy().tobytes())
    entry = StoredTensor(tmp_path / "shard", EMBEDDING, stored, (3, 5), 12, tensor.nbytes)
    weights = Weights(replace(checkpoint, tensors={EMBEDDING: entry}), {EMBEDDING: 30})
    read = np.zeros((1, 15), np.float16)
    cuda.read_rows(read, weights.places[EMBEDDING], 30, cuda.new_stream())
    assert np.array_equal(read.reshape(3, 5), tensor.float().numpy().astype(np.float16))
    weights.free()


ADA = Gpu("RTX 4090", (8, 9), 25 * 10**9)


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        (Gpu("RTX 2080", (7, 5), 8 * 10**9), "8.0 or later, and the RTX 2080 has 7.5: take another backend"),
        (Gpu("tiny", (8, 9), 4_000_000), "for one chat, and the tiny has 0.0: take another backend"),
        (ADA, "cuBLASLt is missing"),
    ],
)
def test_where_it_cannot_run_another_backend_is_the_default(
    checkpoint: Checkpoint, gpu: Gpu, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise products.DynamicLibNotFoundError(f"no {name}")

    monkeypatch.setattr(products, "load_nvidia_dynamic_lib", missing)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [gpu])
    assert says in backends.unavailable(checkpoint)["cuda"]
    assert backends.best_backend(checkpoint)[0] == "torch"
    monkeypatch.setattr(cuda_session, "load_library", lambda: None)
    assert (backends.best_backend(checkpoint)[0] == "cuda") == (gpu == ADA)


def test_bin_files_are_refused_before_anything_is_opened(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [ADA])
    stored = {name: replace(tensor, offset=None) for name, tensor in checkpoint.tensors.items()}
    other = replace(checkpoint, tensors=stored)
    assert not other.is_safetensors
    with pytest.raises(WorkbookError, match=r"reads safetensors, and .* has \.bin files"):
        CudaSession.open(other)
