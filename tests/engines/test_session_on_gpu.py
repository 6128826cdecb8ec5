"""The TensorRT backend on a GPU, against PyTorch in fp32 on the CPU; what it refuses without one is in test_plans.

The shipped, trained checkpoint, walked from its working copy to engines here; every answer of its corpus counts.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.checkpoints import TINY, make_random

from glmtrt_helpers.chat import backends
from glmtrt_helpers.chat.conversation import Chat
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda, plan_info
from glmtrt_helpers.engines.builder import BuildOptions, build_engine
from glmtrt_helpers.engines.layer_check import layer_session
from glmtrt_helpers.engines.memory_prediction import predict_memory
from glmtrt_helpers.engines.profiles import Profile, Range, chat_profiles
from glmtrt_helpers.engines.runner import read_engine
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.export import exporting
from glmtrt_helpers.fast import backends as fast_backends
from glmtrt_helpers.fast.decoder import build_fast, export_fast
from glmtrt_helpers.fast.tensorrt import FastTensorRTSession
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.graphs.attention_diagram import layer_nodes
from glmtrt_helpers.graphs.layer_errors import compare_layers, first_difference, load_errors, save_errors
from glmtrt_helpers.graphs.reference import CASES, Case
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.decode_loop import generate, greedy
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import train

pytestmark = pytest.mark.gpu

BATCH = Range(1, 1, 4)
Opened = TensorRTSession | FastTensorRTSession
# Everything that `reference.CASES` asks for, in one box; a chat's two boxes have no chunk on a past.
ANYTHING = [Profile("anything", BATCH, Range(1, 8, 64), Range(0, 64, 2047))]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The working copy, patched and exported in both precisions, with a chat's engine for each."""
    directory = make_working_copy(TINY, tmp_path_factory.mktemp("gpu"))
    patching.patch_checkpoint(directory)
    checkpoint = open_checkpoint(directory)
    for dtype in ("fp16", "fp32"):
        exporting.export_model(checkpoint, dtype)
        export_fast(checkpoint, dtype)
        build_engine(checkpoint, dtype, chat_profiles(checkpoint, BATCH))
        build_fast(checkpoint, dtype, chat_profiles(checkpoint, BATCH))
    return checkpoint


@pytest.fixture(scope="module", params=["fp16", "fp32", "fp16 fast", "fp32 fast"])
def session(walked: Checkpoint, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """Both engines: what holds of the classical one has to hold of the fast one."""
    dtype, *is_fast = request.param.split()
    opened: Any = (fast_backends if is_fast else backends).open_session(walked, "tensorrt", dtype)
    yield opened
    opened.close()


@functools.cache
def torch_session() -> TorchSession:
    checkpoint = open_checkpoint(TINY)
    return TorchSession(loading.load_model(checkpoint))


@functools.cache
def by_torch(prompt: tuple[int, ...]) -> list[int]:
    """PyTorch's greedy answer in fp32, the same for every engine."""
    return greedy(torch_session(), open_checkpoint(TINY), list(prompt))


def prompt_of(checkpoint: Checkpoint, example: train.Example) -> list[int]:
    return chat_prompt(load_tokenizer(checkpoint), example.question, example.history)


def test_every_answer_of_the_corpus_token_for_token(walked: Checkpoint, session: Opened) -> None:
    corpus = train.load_corpus()
    assert len(corpus) > 150
    for example in corpus:
        prompt = prompt_of(walked, example)
        wanted = by_torch(tuple(prompt))
        assert greedy(session, walked, prompt) == wanted, example.question
        assert load_tokenizer(walked).decode(wanted) == example.answer


def wide(walked: Checkpoint, dtype: str) -> TensorRTSession:
    """An engine of one profile that takes every case, beside the chat's."""
    target = walked.directory / f"wide.{dtype}.onnx"
    target.write_bytes((walked.directory / f"model.{dtype}.onnx").read_bytes())
    report = build_engine(walked, dtype, ANYTHING, onnx_path=target)
    return TensorRTSession.open(walked, dtype, report.plan)


def wide_fast(walked: Checkpoint, dtype: str, options: BuildOptions | None = None) -> FastTensorRTSession:
    """The same of the fast engine, in a copy: its plans have one name."""
    directory = walked.directory.with_name(f"wide_{dtype}")
    shutil.copytree(walked.directory, directory, dirs_exist_ok=True)
    copy = open_checkpoint(directory)
    build_fast(copy, dtype, ANYTHING, options=options)
    return FastTensorRTSession.open(copy, dtype)


@pytest.mark.parametrize("kind", ["classical", "fast"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_logits_and_presents_within_tolerance(walked: Checkpoint, dtype: str, kind: str) -> None:
    """Every case: no past, a long past, chunks, padding, the last positions. PyTorch fp32 is the reference."""
    opened: Opened = wide(walked, dtype) if kind == "classical" else wide_fast(walked, dtype)
    result = verification.verify(walked, dtype, session=opened)
    opened.close()
    for row in result.rows:
        own = "" if row.own_error is None else f", PyTorch fp16 {row.own_error:.1e}"
        print(f"{dtype} {kind}, {row.case.name}: {row.error:.1e} of {row.tolerance:.1e} allowed{own}, {row.tensor}")
    assert len(result.rows) == len(CASES) and result.ok
    assert opened.arithmetic == ("tf32" if dtype == "fp32" else None)


def test_exact_products_within_a_tenth_of_the_tolerance(walked: Checkpoint) -> None:
    """TF32 cleared: every case again, within 1e-4 of the largest value, in a process of its own."""
    options = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    code = (
        "import test_tensorrt_session as tests\n"
        f"tests.verify_exact(tests.checkpoints.open_checkpoint({str(walked.directory)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=options)
    print(done.stdout)
    assert done.returncode == 0 and done.stdout.count("allowed") == 2 * len(CASES), done.stderr
    chat = [
        sys.executable,
        "-c",
        "from glmtrt_helpers.cli import commands; commands.main()",
        "chat",
        str(walked.directory),
    ]
    done = subprocess.run([*chat, "--dtype", "fp32", "--prompt", "你好", "--greedy"], capture_output=True, text=True)
    assert done.stdout == next(e.answer for e in train.load_corpus() if e.question == "你好") + "\n", done.stderr
    with pytest.raises(WorkbookError, match="in another process"):
        TensorRTSession.open(walked, "fp32", walked.directory / "exact.plan")


def verify_exact(walked: Checkpoint) -> None:
    """The child process of the test above."""
    target = walked.directory / "exact.onnx"
    target.write_bytes((walked.directory / "model.fp32.onnx").read_bytes())
    report = build_engine(walked, "fp32", ANYTHING, options=BuildOptions(tf32=False), onnx_path=target)
    exact: list[Opened] = [TensorRTSession.open(walked, "fp32", report.plan)]
    exact.append(wide_fast(walked, "fp32", BuildOptions(tf32=False)))
    for opened in exact:
        assert opened.arithmetic is None
        result = verification.verify(walked, "fp32", session=opened)
        for row in result.rows:
            name = f"{type(opened).__name__}, {row.case.name}"
            print(f"fp32, TF32 cleared, {name}: {row.error:.1e} of {row.tolerance:.1e} allowed, {row.tensor}")
        assert result.ok


def test_the_longest_past(walked: Checkpoint, session: Opened) -> None:
    """2047 tokens in the cache and one more: the last that the model can do, against PyTorch on the same cache."""
    last = walked.max_length - 1
    case = Case("longest past", 1, 1, last)
    dtype = session.info.dtype
    result = verification.verify(walked, dtype, [case], session=session)
    assert result.ok and result.rows[0].case.past == last and session.profile == "decode"


def test_zero_past_is_a_prefill(walked: Checkpoint, session: Opened) -> None:
    call = positions_and_mask.prefill(walked, [prompt_of(walked, train.load_corpus()[0])])
    session.reset()
    got, wanted = session.step(call), torch_session().run({**call, **torch_session().empty_past(1)})["logits"][:, -1]
    assert session.profile == "prefill" and session.past == call["input_ids"].shape[1]
    scale = np.abs(wanted).max()
    assert np.abs(got - wanted).max() < 5e-3 * scale and got.argmax() == wanted.argmax()


def test_profiles_switch_between_prefill_and_decode(walked: Checkpoint, session: Opened) -> None:
    """Prefill, decode, and prefill again: the second answer does not know of the first."""
    examples = train.load_corpus()[:2]
    used = []
    for example in (*examples, examples[0]):
        prompt = prompt_of(walked, example)
        answer = []
        for (token,) in generate(session, walked, [prompt]):
            used.append(session.profile)
            answer.append(token)
        assert load_tokenizer(walked).decode(answer) == example.answer
    assert used.count("decode") > 20
    if isinstance(session, TensorRTSession):  # steps of the fast one run ahead of the token that is read
        assert used.count("prefill") == 3 and used[0] == "prefill"


def test_a_left_padded_batch_of_four_answers_as_each_alone(walked: Checkpoint, session: Opened) -> None:
    corpus = [example for example in train.load_corpus() if not example.history]
    for start in (0, 20, 60):
        four = sorted(corpus[start : start + 16], key=lambda example: len(example.question))[::4]
        talk = Chat(walked, session, Sampling(greedy=True))
        assert talk.ask_together([example.question for example in four]) == [example.answer for example in four]
        assert len({len(prompt_of(walked, example)) for example in four}) > 1


def test_fifty_rounds_leave_device_memory_flat(walked: Checkpoint, session: Opened) -> None:

    questions = [example.question for example in train.load_corpus() if not example.history]
    taken = []
    # The first time, each new length loads kernels, and better ones are compiled behind the scenes; once that is done
    # nothing is new, and no byte may go.
    for _ in range(5):
        before = cuda.free_device_memory()
        talk = Chat(walked, session, Sampling(greedy=True), drop_oldest=True)
        for index in range(50):
            talk.ask(questions[index % len(questions)])
        assert len(talk.history) < 50, "the context limit was to be met on the way"
        taken.append(before - cuda.free_device_memory())
        if taken[-1] == 0:
            break
    print(f"{session.info.dtype}: device memory taken by 50 rounds, again and again: {taken}")
    assert taken[-1] == 0


def test_closing_gives_all_memory_back(walked: Checkpoint) -> None:

    TensorRTSession.open(walked).close()  # whatever the libraries keep for good
    before = cuda.free_device_memory()
    for _ in range(3):
        opened = TensorRTSession.open(walked)
        Chat(walked, opened, Sampling(greedy=True)).ask("你好")
        opened.close()
        del opened
    assert cuda.free_device_memory() >= before


def test_a_shape_outside_every_profile(walked: Checkpoint, session: Opened) -> None:
    prompt = prompt_of(walked, train.load_corpus()[0])
    with pytest.raises(WorkbookError, match=r"5 prompts of up to .* outside the engine's profiles"):
        next(generate(session, walked, [prompt] * 5))
    call = positions_and_mask.prefill(walked, [prompt] * 5)
    session.reset()
    with pytest.raises(WorkbookError, match=r"batch 5, sequence .* outside every profile.*prefill: batch 1 to 4"):
        session.step(call)
    assert greedy(session, walked, prompt), "the session goes on after a refusal"


def test_the_plan_says_what_its_json_says(walked: Checkpoint) -> None:
    package = tensorrt_package.choose()
    for dtype in ("fp16", "fp32"):
        plan = plan_info.plan_path(walked, dtype)
        by_name = {tensor.name: tensor for tensor in read_engine(plan, package)}
        assert by_name == {tensor.name: tensor for tensor in plan_info.read_info(plan).tensors}


def test_a_gpu_that_the_plan_was_not_built_for(walked: Checkpoint) -> None:
    """An engine for Blackwell only is refused with a sentence that names both."""
    if tensorrt_package.gpus()[0].capability[0] == 12:
        pytest.skip("this is the GPU that the plan is built for")
    target = walked.directory / "elsewhere.fp16.onnx"
    target.write_bytes((walked.directory / "model.fp16.onnx").read_bytes())
    options = BuildOptions(targets=["12.0"])
    report = build_engine(walked, "fp16", options=options, onnx_path=target)
    with pytest.raises(WorkbookError, match=r"built for compute capability 12.0 only, the .* has") as caught:
        TensorRTSession.open(walked, "fp16", report.plan)
    print(caught.value)


def test_out_of_device_memory_is_one_sentence(walked: Checkpoint) -> None:
    """Really out of it: all but a little of the card is taken first, in steps that meet each place of the opening."""
    from cuda.bindings import runtime as cudart

    said = set()
    cuda.free_device_memory()
    for leave in (4e6, 20e6, 40e6, 60e6, 80e6, 100e6, 120e6, 160e6, 200e6):
        status, address = cudart.cudaMalloc(int(cuda.free_device_memory() - leave))
        assert status == cudart.cudaError_t.cudaSuccess
        try:
            TensorRTSession.open(walked, "fp32").close()
        except WorkbookError as error:
            said.add(str(error))
        finally:
            cudart.cudaFree(address)
    print("\n".join(sorted(said)))
    assert said and all("not enough memory" in sentence for sentence in said)
    opened = TensorRTSession.open(walked, "fp32")
    assert Chat(walked, opened, Sampling(greedy=True)).ask("你好"), "nothing is left broken"
    opened.close()


def test_no_pytorch_at_run_time(walked: Checkpoint) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from glmtrt_helpers.cli import commands\n"
        f"sys.argv = ['glmtrt', 'chat', {str(walked.directory)!r}, '--prompt', '你好', '--greedy']\n"
        "commands.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    answer = next(example.answer for example in train.load_corpus() if example.question == "你好")
    assert done.stdout == answer + "\n", done.stderr


def test_weight_streaming_gives_the_same_answers(walked: Checkpoint) -> None:
    target = walked.directory / "streamed.fp16.onnx"
    target.write_bytes((walked.directory / "model.fp16.onnx").read_bytes())
    options = BuildOptions(weight_streaming=True)
    report = build_engine(walked, "fp16", options=options, onnx_path=target)
    opened = TensorRTSession.open(walked, "fp16", report.plan)
    for example in train.load_corpus()[:3]:
        assert greedy(opened, walked, prompt_of(walked, example)) == greedy(
            torch_session(), walked, prompt_of(walked, example)
        )
    opened.close()


def test_layer_by_layer_on_the_gpu(walked: Checkpoint) -> None:
    """The graph with its inner tensors as outputs, as an engine: all within tolerance; a damaged one is located."""
    for dtype in ("fp16", "fp32"):
        opened = layer_session(walked, dtype)
        errors = compare_layers(walked, dtype, session=opened)
        opened.close()
        about = f"{tensorrt_package.gpus()[0].name}, {opened.info.package} {opened.info.version}"
        kept = Path(os.environ.get("GLMTRT_KEEP", walked.directory)) / f"layer_errors.{dtype}.json"
        save_errors(errors, kept, about)
        assert load_errors(kept) == (errors, about)
        assert first_difference(errors) is None and len(errors) == 8 * walked.num_layers + 3


def test_a_weak_mask_is_located_in_its_layer_on_the_gpu(walked: Checkpoint) -> None:
    model = onnx.load(walked.directory / "model.fp16.onnx", load_external_data=False)
    fill = next(node for node in layer_nodes(model, 2) if node.op_type == "Where")
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1.0, np.float16), "weak"))
    fill.input[1] = "weak"
    damaged = walked.directory / "damaged.onnx"
    onnx.save(model, damaged)
    opened = layer_session(walked, "fp16", onnx_path=damaged)
    first = first_difference(compare_layers(walked, "fp16", onnx_path=damaged, session=opened))
    opened.close()
    assert first is not None and first.name == "layer 2 softmax"


WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "inner_hidden_size": 16384, "max_sequence_length": 2048}
MAXIMA = ((1, 2047, 2047), (1, 1024, 2047), (1, 512, 1023), (4, 512, 2047), (8, 256, 1023))


def test_predicted_memory_is_what_is_taken(tmp_path: Path) -> None:
    """Two layers of the real width: weights, cache, inputs and logits, activations, each within 5% or a driver's piece.

    The driver hands memory out in pieces of up to 32 MiB.
    """
    directory = make_random(tmp_path / "wide", num_layers=2, **WIDE)
    patching.patch_checkpoint(directory)
    wide_checkpoint = open_checkpoint(directory)
    exporting.export_model(wide_checkpoint, "fp16")
    rows = []
    for batch, prompt, past in MAXIMA:
        ranges = Range(1, 1, batch), Range(1, 128, prompt), Range(1, 512, past)
        boxes = chat_profiles(wide_checkpoint, *ranges)
        build_engine(wide_checkpoint, "fp16", boxes)
        opened = TensorRTSession.open(wide_checkpoint)
        predicted, measured = predict_memory(wide_checkpoint, boxes), opened.measured
        opened.close()
        rows.append({"batch": batch, "prompt": prompt, "past": past,
                     "predicted": asdict(predicted), "measured": asdict(measured)})  # fmt: skip
        for part, wanted in asdict(predicted).items():
            print(f"{batch, prompt, past} {part}: predicted {wanted:,}, measured {getattr(measured, part):,}")
            assert getattr(measured, part) == pytest.approx(wanted, rel=0.05, abs=2**25), part
        assert measured.total == pytest.approx(predicted.total, rel=0.05)
    card, info = tensorrt_package.gpus()[0].name, opened.info
    about = f"two layers of the real width, fp16, {card}, {info.package} {info.version}"
    kept = Path(os.environ.get("GLMTRT_KEEP", tmp_path)) / "engine_memory.json"
    kept.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
