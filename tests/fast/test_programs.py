"""decoder.cu on the host, thread by thread, against the specification's formulas in fp64; both programs compiled."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.host_decoder import compile_decoder

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.loading import load_bounded
from glmtrt_helpers.checkpoints.remote_code import inv_freq
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.fast import products, programs
from glmtrt_helpers.fast.cuda_session import CudaSession
from glmtrt_helpers.fast.memory_prediction import ROWS
from glmtrt_helpers.fast.weights import rotary_tables
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import generate
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin.conversations import load_corpus

FULL = programs.Sizes(hidden=4096, heads=32, inner=16384, warps=16, unit=1024)
# Compute capability, multiprocessors, bytes of shared memory that a block may have.
CARDS = [((8, 0), 108, 166912), ((8, 6), 84, 101376), ((8, 9), 128, 101376), ((9, 0), 132, 232448),
         ((10, 0), 148, 232448), ((12, 0), 170, 101376)]  # fmt: skip
LAYERS, VOCABULARY, SLOTS, ROOM, BLANK = 2, 176, 8, 40, 5
# id, position, block position, slot, place, tokens that it sees. The last four are one chat's.
CHATS = np.array(
    [(7, 3, 0, 0, 3, 4), (9, 5, 2, 1, 8, 9), (100, 6, 3, 2, 32, 33), (20, 1, 1, 3, 0, 1),
     (21, 7, 2, 5, 19, 20), (22, 7, 3, 5, 20, 21), (23, 7, 4, 5, 21, 22), (24, 7, 5, 5, 22, 23)],
    np.int32,
)  # fmt: skip


class Model:
    """Random weights of a small size, and a cache that is full of other chats."""

    def __init__(self, sizes: programs.Sizes):
        random, hidden, inner = np.random.default_rng(0), sizes.hidden, sizes.inner

        def make(*shape: int, scale: float = 1.0, about: float = 0.0) -> np.ndarray:
            return (about + scale * random.standard_normal(shape)).astype(np.float16)

        self.sizes = sizes
        shapes = {
            "qkv": (3 * hidden, hidden),
            "dense": (hidden, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }
        self.layers = []
        for _ in range(LAYERS):
            layer = {name: make(*shape, scale=shape[1] ** -0.5) for name, shape in shapes.items()}
            layer |= {f"{name}_bias": make(shape[0], scale=0.1) for name, shape in shapes.items()}
            layer |= {name: make(hidden, scale=0.1, about=1) for name in ("norm1", "norm2")}
            layer |= {f"{name}_bias": make(hidden, scale=0.1) for name in ("norm1", "norm2")}
            self.layers.append(layer)
        self.embedding, self.head = make(VOCABULARY, hidden), make(VOCABULARY, hidden, scale=hidden**-0.5)
        self.norm, self.norm_bias = make(hidden, scale=0.1, about=1), make(hidden, scale=0.1)
        self.cos, self.sin = rotary_tables(ROOM, sizes.head)
        self.cache = make(LAYERS, 2, SLOTS, ROOM, sizes.heads, sizes.head)

    def expected(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits (rows, vocabulary) and the cache afterwards, in fp64."""
        heads, size, alpha = self.sizes.heads, self.sizes.head, 56**0.5
        cache, hidden = self.cache.astype(np.float64), self.embedding[rows[:, 0]].astype(np.float64)
        for layer, weights in enumerate(self.layers):
            w = {name: array.astype(np.float64) for name, array in weights.items()}
            stream = normed(hidden, w["norm1"], w["norm1_bias"])
            mixed = (stream @ w["qkv"].T + w["qkv_bias"]).reshape(len(rows), heads, 3, size)
            query = np.empty((len(rows), heads, size))
            for n, (_, position, block_position, slot, place, _) in enumerate(rows):
                query[n] = self.turned(mixed[n, :, 0], position, block_position)
                cache[layer, 0, slot, place] = self.turned(mixed[n, :, 1], position, block_position)
                cache[layer, 1, slot, place] = mixed[n, :, 2]
            seen = np.empty((len(rows), heads * size))
            for n, (*_, slot, _, end) in enumerate(rows):
                keys, values = cache[layer, :, slot, :end]
                scores = np.einsum("hd,thd->ht", query[n], keys) / size**0.5
                shares = np.exp(scores - scores.max(axis=1, keepdims=True))
                shares /= shares.sum(axis=1, keepdims=True)
                seen[n] = np.einsum("ht,thd->hd", shares, values).reshape(-1)
            middle = normed(alpha * stream + seen @ w["dense"].T + w["dense_bias"], w["norm2"], w["norm2_bias"])
            inner = middle @ w["up"].T + w["up_bias"]
            inner = 0.5 * inner * (1 + np.tanh(0.79788456 * inner * (1 + 0.044715 * inner**2)))
            hidden = alpha * middle + inner @ w["down"].T + w["down_bias"]
        last = normed(hidden, self.norm.astype(np.float64), self.norm_bias.astype(np.float64))
        return last @ self.head.T.astype(np.float64), cache

    def turned(self, x: np.ndarray, position: int, block_position: int) -> np.ndarray:
        first, second, third, fourth = np.split(x, 4, axis=-1)
        a, b = (table[position].astype(np.float64) for table in (self.cos, self.sin))
        c, d = (table[block_position].astype(np.float64) for table in (self.cos, self.sin))
        turned = first * a - second * b, second * a + first * b, third * c - fourth * d, fourth * c + third * d
        return np.concatenate(turned, axis=-1)


def normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    apart = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(apart / np.sqrt((apart**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias)


Run = Callable[..., tuple[dict[str, np.ndarray], np.ndarray]]


@pytest.fixture(
    scope="module", params=[(128, 2), pytest.param((256, 3), marks=pytest.mark.slow)], ids=["one unit a row", "two"]
)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Run]:
    """The program for a size, on a number of blocks, as a function of the rows."""
    hidden, blocks = request.param
    sizes = programs.Sizes(hidden, heads=4, inner=4 * hidden, warps=4, unit=128)
    library = compile_decoder(sizes, blocks, tmp_path_factory.mktemp("decoder"))
    model = Model(sizes)

    def run(
        rows: np.ndarray, kernel: int, cache: np.ndarray, epoch: int = 0
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        def unset(*shape: int) -> np.ndarray:
            return np.full((ROWS, *shape), np.nan, np.float32)

        buffers = {name: unset(hidden) for name in ("hidden", "middle", "query")}
        buffers |= {"pieces": unset(sizes.heads, programs.PIECES, sizes.head + 4), "logits": unset(VOCABULARY)}
        buffers |= {
            "inner": unset(sizes.inner).astype(np.float16),
            "best": np.zeros((ROWS, blocks, 3), np.int32),
        }
        buffers |= {"tokens": np.zeros(ROWS, np.int32), "rows": rows.copy()}
        buffers["arrived"] = np.full(1, epoch, np.uint32)
        buffers["layers"] = np.array(
            [[layer[name].ctypes.data for name in programs.LAYER] for layer in model.layers], np.uint64
        )
        fixed = {name: getattr(model, name) for name in ("embedding", "head", "norm", "norm_bias", "cos", "sin")}
        addresses = {name: array.ctypes.data for name, array in {**buffers, **fixed, "cache": cache}.items()}
        step = programs.Step(
            **addresses, epoch=epoch, layer_count=LAYERS, row_count=len(rows), slots=SLOTS, room=ROOM,
            vocabulary=VOCABULARY, blank=BLANK, epsilon=1e-5, alpha=56**0.5,
        )  # fmt: skip
        assert library.run_step(ctypes.byref(step), kernel) == ctypes.sizeof(step)
        return buffers, cache

    return model, run


def check(model: Model, rows: np.ndarray, buffers: dict[str, np.ndarray], cache: np.ndarray) -> None:
    logits, whole = model.expected(rows)
    count = len(rows)
    assert np.allclose(buffers["logits"][:count], logits, atol=2e-3 * np.abs(logits).max())
    assert np.isnan(buffers["logits"][count:]).all(), "rows that are not there"
    assert np.allclose(cache.astype(np.float64), whole, atol=5e-3)
    untouched = np.ones(cache.shape[2:4], bool)
    untouched[rows[:, 3], rows[:, 4]] = False
    assert np.array_equal(cache[:, :, untouched], model.cache[:, :, untouched])
    tokens = buffers["tokens"][:count]
    assert (tokens == buffers["logits"][:count].argmax(axis=1)).all()
    after = np.stack([tokens, rows[:, 1], rows[:, 2] + 1, rows[:, 3], rows[:, 4] + 1, rows[:, 4] + 2], axis=1)
    assert np.array_equal(buffers["rows"], after)


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 2), (3, 4), (8, 8))]


@pytest.mark.parametrize(("count", "kernel"), [(1, 1), *SLOW])
def test_a_step_thread_by_thread(decoder: tuple[Model, Run], count: int, kernel: int) -> None:
    """Chats of 1 to 33 tokens, and four new tokens of one chat, the later of which see the earlier."""
    model, run = decoder
    check(model, CHATS[:count], *run(CHATS[:count], kernel, model.cache.copy()))


@pytest.mark.slow
def test_a_row_does_not_depend_on_how_many_there_are(decoder: tuple[Model, Run]) -> None:
    """Equal to the bit, in every kernel; and with a counter of arrivals that is about to overflow."""
    model, run = decoder
    alone = run(CHATS[2:3], 1, model.cache.copy())[0]["logits"][0]
    for kernel in (2, 4, 8):
        assert np.array_equal(run(CHATS[2:3], kernel, model.cache.copy(), 2**32 - 7)[0]["logits"][0], alone)
    assert np.array_equal(run(CHATS, 8, model.cache.copy())[0]["logits"][2], alone)


@pytest.mark.slow
def test_a_score_that_is_no_number_gives_the_blank_in_its_row_alone(decoder: tuple[Model, Run]) -> None:
    model, run = decoder
    cache = model.cache.copy()
    cache[1, 1, CHATS[0, 3], 0, 0, 0] = np.inf
    tokens = run(CHATS[:2], 2, cache)[0]["tokens"]
    assert tokens[0] == BLANK
    assert tokens[1] == model.expected(CHATS[:2])[0][1].argmax() != BLANK


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "blocks", "shared"), CARDS)
def test_the_programs_are_compiled_for_every_card_without_one(
    capability: tuple[int, int], blocks: int, shared: int
) -> None:
    """decoder.cu keeps some of what is worked out once in local memory; the loops over the weights need no more."""
    options = programs.defines(FULL, blocks, shared)
    assert options["STAGES"] >= 3
    assert options["STAGES"] * FULL.stage + options["RESERVED"] <= shared
    for name, most in (("decoder", 256), ("prompt", 0)):
        code, report = programs.compile_program(name, capability, options, bulk=capability >= (9, 0))
        used = programs.resources(report)
        assert code.startswith(b"\x7fELF") and set(used) == set(programs.KERNELS[name])
        for kernel, needs in used.items():
            assert needs["spills"] <= most, kernel
            assert needs["registers"] <= (96 if name == "decoder" else 255), kernel


def test_a_source_that_does_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(programs.PARTS, "prompt", ("primitives.cuh", "prompt.cu"))  # without attention.cuh
    with pytest.raises(WorkbookError, match=r"prompt\.cu was not compiled for --gpu-architecture=sm_90"):
        programs.compile_program("prompt", (9, 0), programs.defines(FULL, 132, 232448), bulk=True)


def test_sizes_that_the_programs_do_not_take(tiny_run: Path) -> None:
    checkpoint = open_checkpoint(tiny_run)
    assert programs.sizes_of(checkpoint) == programs.Sizes(hidden=128, heads=4, inner=512, warps=4, unit=128)
    for changed in ({"hidden_size": 384}, {"num_attention_heads": 8}, {"vocab_size": 1757}, {"inner_hidden_size": 500}):
        other = replace(checkpoint, config={**checkpoint.config, **changed})
        with pytest.raises(WorkbookError, match=r"the one-kernel engine takes .*: take another backend"):
            programs.sizes_of(other)


def test_without_a_gpu_or_in_fp32_it_is_refused_in_a_sentence(tiny_run: Path) -> None:
    checkpoint = open_checkpoint(tiny_run)
    with pytest.raises(WorkbookError, match="needs an NVIDIA GPU and its driver: take another backend"):
        CudaSession.open(checkpoint)
    with pytest.raises(WorkbookError, match="computes in fp16: leave --dtype fp32 out"):
        CudaSession.open(checkpoint, "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("bulk", [None, False], ids=["as the card has it", "as from 8.0 on"])
def test_the_trained_answers_on_the_gpu(tiny_run: Path, bulk: bool | None) -> None:
    """Questions of the corpus, in batches of 1, 4, 8 and 16, as PyTorch in fp32 answers them; then scores."""
    checkpoint = open_checkpoint(tiny_run)
    tokenizer, reference = load_tokenizer(checkpoint), TorchSession(load_bounded(checkpoint, torch.float32))
    questions = [example.question for example in load_corpus() if not example.history][:48]
    prompts = [chat_prompt(tokenizer, question) for question in questions]
    wanted = [[row[0] for row in generate(reference, checkpoint, [prompt])] for prompt in prompts]
    session = CudaSession(checkpoint, bulk=bulk, shared=None if bulk is None else 99 * 1024)
    try:
        for batch in (1, 4, 8, 16):
            for first in range(0, len(prompts), batch):
                steps = list(generate(session, checkpoint, prompts[first : first + batch]))
                for row in range(batch):
                    answer = [step[row] for step in steps if step[row] is not None]
                    assert answer == [token for token in wanted[first + row] if token is not None]
        for count in (2, 9):  # rows of different lengths; their prompt, and steps that the host feeds
            call = positions_and_mask.prefill(checkpoint, prompts[:count])
            session.reset(), reference.reset()
            for _ in range(3):
                scores, expected = session.step(call), reference.step(call)
                assert np.allclose(scores, expected, atol=0.01 * np.abs(expected).max())
                call = positions_and_mask.decode(call, expected.argmax(axis=-1))
    finally:
        session.close()


def test_too_little_shared_memory_is_told() -> None:
    with pytest.raises(
        WorkbookError, match=r"needs 81,216 bytes of shared memory .* and this GPU has 65,536: take another"
    ):
        programs.defines(FULL, 40, 65536)


def test_without_cublaslt_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise products.DynamicLibNotFoundError(f"no {name}")

    monkeypatch.setattr(products, "load_nvidia_dynamic_lib", missing)
    with pytest.raises(WorkbookError, match=r"cuBLASLt is missing, .*\(no cublasLt\): pip install nvidia-cublas"):
        products.Products()


def test_rotary_tables_are_upstreams() -> None:
    """PyTorch's fp16 numbers, up to one rounding of cos and sin."""
    angles = torch.outer(torch.arange(2048, dtype=torch.float16), inv_freq(64))
    for table, expected in zip(rotary_tables(2048, 128), (angles.cos(), angles.sin()), strict=True):
        assert np.allclose(table, expected.numpy(), rtol=2**-10, atol=2**-14)
