"""Both engines on a GPU, TensorRT's and the one-kernel one, against PyTorch in fp32.

On the shipped, trained checkpoint: every answer of its corpus counts.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import TINY

from glmtrt_helpers.chat import backends
from glmtrt_helpers.chat.conversation import Chat
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda
from glmtrt_helpers.engines.builder import BuildOptions, build_engine
from glmtrt_helpers.engines.profiles import Profile, Range
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.fast.cuda_session import CudaSession
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.graphs.reference import CASES, Case
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import generate, greedy
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import conversations

pytestmark = pytest.mark.gpu

Opened = TensorRTSession | CudaSession
# One profile for all of `reference.CASES`; the two of a chat do not cover a chunk on a past.
ANY_SHAPE = [Profile("any shape", Range(1, 1, 4), Range(1, 8, 64), Range(0, 64, 2047))]


@pytest.fixture(scope="module", params=["fp16 tensorrt", "fp32 tensorrt", "fp16 cuda"])
def kind(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Precision and backend: what holds for one has to hold for the others."""
    dtype, backend = request.param.split()
    return dtype, backend


@pytest.fixture(scope="module")
def session(trained: Checkpoint, kind: tuple[str, str]) -> Iterator[Opened]:
    opened: Any = backends.open_session(trained, kind[1], kind[0])
    yield opened
    opened.close()


@pytest.fixture
def engine(session: Opened) -> TensorRTSession:
    """Where it is TensorRT's, which has profiles."""
    if not isinstance(session, TensorRTSession):
        pytest.skip("the one-kernel engine has no profiles")
    return session


@functools.cache
def torch_session() -> TorchSession:
    checkpoint = open_checkpoint(TINY)
    return TorchSession(loading.load_model(checkpoint))


@functools.cache
def by_torch(prompt: tuple[int, ...]) -> list[int]:
    """PyTorch's greedy answer in fp32, computed once for all engines."""
    return greedy(torch_session(), open_checkpoint(TINY), list(prompt))


def prompt_of(checkpoint: Checkpoint, example: conversations.Example) -> list[int]:
    return chat_prompt(load_tokenizer(checkpoint), example.question, example.history)


def test_every_answer_of_the_corpus_token_for_token(trained: Checkpoint, session: Opened) -> None:
    corpus = conversations.load_corpus()
    assert len(corpus) > 150
    for example in corpus:
        prompt = prompt_of(trained, example)
        expected = by_torch(tuple(prompt))
        assert greedy(session, trained, prompt) == expected, example.question
        assert load_tokenizer(trained).decode(expected) == example.answer


def open_wide(trained: Checkpoint, dtype: str) -> TensorRTSession:
    """An engine whose one profile covers every case, next to the chat's."""
    target = trained.directory / f"wide.{dtype}.onnx"
    target.write_bytes((trained.directory / f"model.{dtype}.onnx").read_bytes())
    report = build_engine(trained, dtype, ANY_SHAPE, onnx_path=target)
    return TensorRTSession.open(trained, dtype, report.plan)


def test_logits_and_presents_within_tolerance(trained: Checkpoint, kind: tuple[str, str]) -> None:
    """Every case: no past, a long past, chunks, padding, the last positions. PyTorch fp32 is the reference."""
    dtype, backend = kind
    opened: Opened = open_wide(trained, dtype) if backend == "tensorrt" else CudaSession.open(trained)
    result = verification.verify(trained, dtype, session=opened)
    opened.close()
    for row in result.rows:
        own = "" if row.own_error is None else f", PyTorch fp16 {row.own_error:.1e}"
        print(
            f"{dtype} {backend}, {row.case.name}: {row.error:.1e} of {row.tolerance:.1e} tolerated{own}, {row.tensor}"
        )
    assert len(result.rows) == len(CASES) and result.ok
    assert getattr(opened, "arithmetic", None) == ("tf32" if dtype == "fp32" else None)


def test_exact_fp32_matmuls_are_within_a_tenth_of_the_tolerance(trained: Checkpoint) -> None:
    """Without TF32, every case is within 1e-4 of the largest value; in a separate process, which reads the setting."""
    options = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = f"import test_session_on_gpu as tests\ntests.verify_exact(tests.open_checkpoint({str(trained.directory)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=options)
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.count("tolerated") == len(CASES), done.stderr
    chat = [
        sys.executable,
        "-c",
        "from glmtrt_helpers.cli import boundary; boundary.main()",
        "chat",
        str(trained.directory),
    ]
    done = subprocess.run([*chat, "--dtype", "fp32", "--prompt", "你好", "--greedy"], capture_output=True, text=True)
    answer = next(example.answer for example in conversations.load_corpus() if example.question == "你好")
    assert done.stdout == answer + "\n", done.stderr
    with pytest.raises(WorkbookError, match="use another process"):
        TensorRTSession.open(trained, "fp32", trained.directory / "exact.plan")


def verify_exact(trained: Checkpoint) -> None:
    """In the child process of the test above."""
    target = trained.directory / "exact.onnx"
    target.write_bytes((trained.directory / "model.fp32.onnx").read_bytes())
    report = build_engine(trained, "fp32", ANY_SHAPE, options=BuildOptions(tf32=False), onnx_path=target)
    opened = TensorRTSession.open(trained, "fp32", report.plan)
    assert opened.arithmetic is None
    result = verification.verify(trained, "fp32", session=opened)
    for row in result.rows:
        print(f"fp32 without TF32, {row.case.name}: {row.error:.1e} of {row.tolerance:.1e} tolerated, {row.tensor}")
    assert result.ok


def test_the_longest_past(trained: Checkpoint, session: Opened, kind: tuple[str, str]) -> None:
    """2047 tokens in the cache and one more, as many as the model has positions."""
    last = trained.max_length - 1
    case = Case("longest past", 1, 1, last)
    result = verification.verify(trained, kind[0], [case], session=session)
    assert result.ok and result.rows[0].case.past == last
    assert not isinstance(session, TensorRTSession) or session.profile == "decode"


def test_zero_past_is_a_prefill(trained: Checkpoint, session: Opened) -> None:
    call = positions_and_mask.prefill(trained, [prompt_of(trained, conversations.load_corpus()[0])])
    session.reset()
    actual = session.step(call)
    expected = torch_session().run({**call, **torch_session().empty_past(1)})["logits"][:, -1]
    assert session.past == call["input_ids"].shape[1]
    assert not isinstance(session, TensorRTSession) or session.profile == "prefill"
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() < 5e-3 * scale and actual.argmax() == expected.argmax()


def test_profiles_switch_between_prefill_and_decode(trained: Checkpoint, engine: TensorRTSession) -> None:
    """Prefill, decode, and prefill again: the second answer does not depend on the first."""
    examples = conversations.load_corpus()[:2]
    used = []
    for example in (*examples, examples[0]):
        prompt = prompt_of(trained, example)
        answer = []
        for (token,) in generate(engine, trained, [prompt]):
            used.append(engine.profile)
            answer.append(token)
        assert load_tokenizer(trained).decode(answer) == example.answer
    assert used.count("decode") > 20
    assert used.count("prefill") == 3 and used[0] == "prefill"


def test_an_answer_that_is_cancelled_midway_leaves_nothing_behind(trained: Checkpoint, session: Opened) -> None:
    first, second = (prompt_of(trained, example) for example in conversations.load_corpus()[:2])
    for tokens in (1, 2, 7):
        answer = generate(session, trained, [first])
        for _ in range(tokens):
            next(answer)
        answer.close()
        assert greedy(session, trained, second) == by_torch(tuple(second))


def test_two_sessions_in_turn(trained: Checkpoint, session: Opened, kind: tuple[str, str]) -> None:
    """Token by token, each with its own cache."""
    both = [prompt_of(trained, example) for example in conversations.load_corpus()[:2]]
    other: Any = backends.open_session(trained, kind[1], kind[0])
    answers: list[list[int]] = [[], []]
    running = {row: generate(each, trained, [both[row]]) for row, each in enumerate((session, other))}
    while running:
        for row, answer in list(running.items()):
            token = next(answer, None)
            if token is None:
                del running[row]
            else:
                answers[row].append(token[0])
    other.close()
    assert answers == [by_torch(tuple(prompt)) for prompt in both]


def test_a_left_padded_batch_of_four_answers_as_each_alone(trained: Checkpoint, session: Opened) -> None:
    corpus = [example for example in conversations.load_corpus() if not example.history]
    for start in (0, 20, 60):
        four = sorted(corpus[start : start + 16], key=lambda example: len(example.question))[::4]
        chat = Chat(trained, session, Sampling(greedy=True))
        assert chat.ask_together([example.question for example in four]) == [example.answer for example in four]
        assert len({len(prompt_of(trained, example)) for example in four}) > 1


def test_fifty_rounds_leave_device_memory_flat(trained: Checkpoint, session: Opened, kind: tuple[str, str]) -> None:
    questions = [example.question for example in conversations.load_corpus() if not example.history]
    taken = []
    # At first each new length loads kernels, and better ones are compiled in the background; after that, no byte more
    # may be taken.
    for _ in range(5):
        before = cuda.free_device_memory()
        chat = Chat(trained, session, Sampling(greedy=True), drop_oldest=True)
        for index in range(50):
            chat.ask(questions[index % len(questions)])
        assert len(chat.history) < 50, "the context limit must be met on the way"
        taken.append(before - cuda.free_device_memory())
        if taken[-1] == 0:
            break
    print(f"{' '.join(kind)}: device memory taken by 50 rounds, each time: {taken}")
    assert taken[-1] == 0


@pytest.mark.parametrize("backend", ["tensorrt", "cuda"])
def test_closing_frees_all_memory(trained: Checkpoint, backend: str) -> None:
    opened = backends.open_session(trained, backend)  # what the libraries keep for good
    Chat(trained, opened, Sampling(greedy=True)).ask("你好")
    opened.close()
    before = cuda.free_device_memory()
    for _ in range(3):
        opened = backends.open_session(trained, backend)
        Chat(trained, opened, Sampling(greedy=True)).ask("你好")
        opened.close()
        del opened
    assert cuda.free_device_memory() >= before


def test_a_shape_outside_every_profile(trained: Checkpoint, engine: TensorRTSession) -> None:
    prompt = prompt_of(trained, conversations.load_corpus()[0])
    with pytest.raises(WorkbookError, match=r"5 prompts of up to .* outside the engine's profiles"):
        next(generate(engine, trained, [prompt] * 5))
    call = positions_and_mask.prefill(trained, [prompt] * 5)
    engine.reset()
    with pytest.raises(WorkbookError, match=r"batch 5, sequence .* outside every profile.*prefill: batch 1 to 4"):
        engine.step(call)
    assert greedy(engine, trained, prompt), "the session goes on after a refusal"


def test_a_gpu_that_the_plan_was_not_built_for(trained: Checkpoint) -> None:
    """An engine for Blackwell only is refused with a sentence that names both."""
    if tensorrt_package.gpus()[0].capability[0] == 12:
        pytest.skip("this is the GPU that the plan is built for")
    target = trained.directory / "elsewhere.fp16.onnx"
    target.write_bytes((trained.directory / "model.fp16.onnx").read_bytes())
    options = BuildOptions(targets=["12.0"])
    report = build_engine(trained, "fp16", options=options, onnx_path=target)
    with pytest.raises(WorkbookError, match=r"built only for compute capability 12.0, the .* has") as caught:
        TensorRTSession.open(trained, "fp16", report.plan)
    print(caught.value)


@pytest.mark.parametrize(("backend", "dtype"), [("tensorrt", "fp32"), ("cuda", "fp16")])
def test_out_of_device_memory_is_one_sentence(trained: Checkpoint, backend: str, dtype: str) -> None:
    """All but a little of the card's memory is taken first, so that every step of the opening fails once."""
    from cuda.bindings import runtime as cudart

    sentences = set()
    cuda.free_device_memory()
    for leave in (4e6, 20e6, 40e6, 60e6, 80e6, 100e6, 120e6, 160e6, 200e6):
        status, address = cudart.cudaMalloc(int(cuda.free_device_memory() - leave))
        assert status == cudart.cudaError_t.cudaSuccess
        try:
            backends.open_session(trained, backend, dtype).close()
        except WorkbookError as error:
            sentences.add(str(error))
        finally:
            cudart.cudaFree(address)
    print("\n".join(sorted(sentences)))
    assert sentences and all("not enough memory" in text or "GPU are free" in text for text in sentences)
    opened = backends.open_session(trained, backend, dtype)
    assert Chat(trained, opened, Sampling(greedy=True)).ask("你好"), "the next opening works"
    opened.close()


@pytest.mark.parametrize("backend", ["tensorrt", "cuda"])
def test_no_pytorch_at_run_time(trained: Checkpoint, backend: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from glmtrt_helpers.cli import boundary\n"
        f"sys.argv = ['glmtrt', 'chat', {str(trained.directory)!r}, '--prompt', '你好', '--greedy', "
        f"'--backend', {backend!r}]\n"
        "boundary.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    answer = next(example.answer for example in conversations.load_corpus() if example.question == "你好")
    assert done.stdout == answer + "\n", done.stderr


def test_weight_streaming_gives_the_same_answers(trained: Checkpoint) -> None:
    target = trained.directory / "streamed.fp16.onnx"
    target.write_bytes((trained.directory / "model.fp16.onnx").read_bytes())
    options = BuildOptions(weight_streaming=True)
    report = build_engine(trained, "fp16", options=options, onnx_path=target)
    opened = TensorRTSession.open(trained, "fp16", report.plan)
    for example in conversations.load_corpus()[:3]:
        assert greedy(opened, trained, prompt_of(trained, example)) == greedy(
            torch_session(), trained, prompt_of(trained, example)
        )
    opened.close()
