"""Notebook 06: sessions, one interface over three backends that run `forward`, and decoding on top of it.

`run` is one call of forward: flat named inputs (`inputs.input_names`) in, flat named outputs out, everything as NumPy
arrays on the host; comparisons use it. `step` is what a chat uses: the session keeps the cache, each call adds to it,
and only the scores of the next token come back. `tensorrt` is in `tensorrt_session`; it and `ort` need no PyTorch.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glmtrt_helpers import feeds
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import cli_options

if TYPE_CHECKING:
    import torch

BACKENDS = ("torch", "ort", "tensorrt")
UNBOUNDED = 2**31


@dataclass(frozen=True)
class Limits:
    """The largest shapes that a session takes: rows, tokens of a prompt, prompt and answer together."""

    batch: int = UNBOUNDED
    prompt: int = UNBOUNDED
    total: int = UNBOUNDED


class Session(ABC):
    """A backend that runs forward. dtype: that of the past, the presents and the logits.

    arithmetic: "tf32" where products of fp32 numbers are rounded, None where dtype says all. last_only: `run` gives the
    logits of the last position alone.
    """

    backend: str
    dtype: np.dtype
    arithmetic: str | None = None
    last_only = False
    limits = Limits()
    _cache: dict[str, np.ndarray] | None = None

    @abstractmethod
    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call of forward, past and presents included. flat: anything that NumPy reads as arrays."""

    @abstractmethod
    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token: 2 * num_layers arrays (0, batch, heads, d)."""

    def reset(self) -> None:
        """Forget the cache: the next `step` is a prefill."""
        self._cache = None

    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scores of the next token, (batch, vocabulary) float32; the presents become the past of the next step.

        call: input_ids, position_ids and attention_mask of one prefill or decode (`feeds`).
        """
        past = self.empty_past(len(call["input_ids"])) if self._cache is None else self._cache
        outputs = self.run({**call, **past})
        logits = outputs.pop("logits")
        self._cache = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
        return logits[:, -1].astype(np.float32)

    def follow(self) -> Generator[np.ndarray] | None:
        """The best tokens (batch,) from the last step on, where the session can feed itself; None where it cannot."""
        return None

    def close(self) -> None:
        """Give back what the session holds; it cannot be used afterwards."""
        self.reset()


class TorchSession(Session):
    """The PyTorch model itself, on the device where it is."""

    backend = "torch"

    def __init__(self, model: torch.nn.Module):
        self.model = model
        parameter = next(model.parameters())
        self.dtype = np.dtype(str(parameter.dtype).removeprefix("torch."))
        self.device = "cuda" if parameter.is_cuda else "cpu"  # a streamed one's weights come to the CPU

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        config: Any = self.model.config
        shape = (0, batch, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        names = [f"past_key_values.{i}.{part}" for i in range(config.num_layers) for part in ("key", "value")]
        return {name: np.zeros(shape, self.dtype) for name in names}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        import torch

        from glmtrt_helpers import inputs

        tensors = {name: torch.as_tensor(value).to(self.device) for name, value in flat.items()}
        with torch.inference_mode():
            outputs = inputs.flat_outputs(self.model(**inputs.forward_kwargs(tensors)))
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}


class OrtSession(Session):
    """A bare ONNX Runtime session, on the CPU unless `providers` say otherwise.

    optimize: ONNX Runtime's default optimisations copy fp16 weights into fp32; without them the weights stay mapped.
    extra_outputs: further outputs that the model at `path` declares, beside those of `inputs.output_names`.
    """

    backend = "ort"

    def __init__(
        self,
        path: str | Path,
        *,
        optimize: bool = True,
        extra_outputs: Sequence[str] = (),
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        import onnxruntime

        path = Path(path)
        if not path.exists():
            how = f"run notebook 03_export_onnx or `glmtrt export {path.parent}{cli_options(path)}`"
            raise WorkbookError(f"{path} is missing: {how}.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, not printed as well
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what a run took goes back at its end
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise WorkbookError(f"ONNX Runtime does not load {path}: {first}; export it again.") from error
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.output_names = [tensor.name for tensor in self.session.get_outputs()]
        unknown = sorted(set(extra_outputs) - set(self.output_names))
        if unknown:
            raise WorkbookError(f"{path} has no output {unknown[0]!r}: add it to the graph before opening a session.")
        half = self.session.get_outputs()[0].type == "tensor(float16)"
        self.dtype = np.dtype(np.float16 if half else np.float32)

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        past = {name: tensor.shape for name, tensor in self.inputs.items() if name.startswith("past_key_values.")}
        return {name: np.zeros((0, batch, *shape[2:]), self.dtype) for name, shape in past.items()}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        feeds = {name: np.ascontiguousarray(flat[name]) for name in self.inputs}
        outputs = self.session.run(self.output_names, feeds)
        return dict(zip(self.output_names, outputs, strict=True))


def open_session(checkpoint: Checkpoint, backend: str, dtype: str = "fp16", *, fast: bool = False) -> Session:
    """The session of a backend by name, over the files that the notebooks before left in the working copy.

    torch runs the source in fp32 where dtype is fp32, ort the exported graph, tensorrt the engine of dtype.
    fast: the decoder of `fast`, through ort or tensorrt.
    """
    if fast:
        from glmtrt_helpers import fast_session

        return fast_session.open_fast(checkpoint, backend, dtype)
    if backend == "torch":
        from glmtrt_helpers import streaming
        from glmtrt_helpers.export import DTYPES

        return TorchSession(streaming.load_bounded(checkpoint, DTYPES[dtype]))
    if backend == "ort":
        from glmtrt_helpers import slicing

        path = checkpoint.directory / f"model.{dtype}.onnx"
        return slicing.plain_session(checkpoint, path) if checkpoint.is_large else OrtSession(path)
    if backend == "tensorrt":
        from glmtrt_helpers.tensorrt_session import TensorRTSession

        return TensorRTSession.open(checkpoint, dtype)
    raise WorkbookError(f"{backend!r} is no backend of this workbook: choose {', '.join(BACKENDS)}.")


def unavailable(checkpoint: Checkpoint, dtype: str = "fp16", *, fast: bool = False) -> dict[str, str]:
    """For every backend that cannot be opened here, why; without opening any."""
    from glmtrt_helpers.fast_session import PARTS

    reasons = {}
    stems = [f"model.{dtype}.fast.{part}" for part in PARTS] if fast else [f"model.{dtype}"]
    try:
        from glmtrt_helpers.loaded import check_plan

        for stem in stems:
            check_plan(checkpoint, checkpoint.directory / f"{stem}.plan")
    except WorkbookError as error:
        reasons["tensorrt"] = str(error)
    except ImportError as error:
        reasons["tensorrt"] = f"cuda-python does not load ({error}): see `glmtrt doctor`."
    graphs = [checkpoint.directory / f"{stem}.onnx" for stem in stems]
    for graph in [graph for graph in graphs if not graph.exists()][:1]:
        how = f"run notebook 03_export_onnx or `glmtrt export {graph.parent}{cli_options(graph)}`"
        reasons["ort"] = f"{graph.name} is missing: {how}."
    if fast:
        reasons["torch"] = "the fast decoder is an exported graph."
    elif importlib.util.find_spec("torch") is None:
        reasons["torch"] = "PyTorch is not installed."
    return reasons


def best_backend(checkpoint: Checkpoint, dtype: str = "fp16", *, fast: bool = False) -> tuple[str, str]:
    """The fastest backend that can be opened here, and why no faster one."""
    missing = unavailable(checkpoint, dtype, fast=fast)
    # ONNX Runtime casts every weight at every call; of a large checkpoint it runs slices, and PyTorch is faster.
    order = ("tensorrt", "torch", "ort") if checkpoint.is_large else ("tensorrt", "ort", "torch")
    for backend in order:
        if backend not in missing:
            return backend, missing.get("tensorrt", "")
    raise WorkbookError("no backend can be opened: " + " ".join(missing.values()))


def take_best(scores: np.ndarray) -> np.ndarray:
    """Greedy choice: (batch, vocabulary) scores to (batch,) ids."""
    return scores.argmax(axis=-1)


def generate(
    session: Session,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    choose: Callable[[np.ndarray], np.ndarray] = take_best,
    max_length: int | None = None,
) -> Iterator[list[int | None]]:
    """Decode prompts of ids as one left-padded batch; yields the new id of every row, step by step.

    A row that has come to <eop> yields None from then on; the end of all rows, or max_length, ends the iteration.
    max_length: prompt and answer together, padding included; at most what model and session can take.
    choose: picks ids (batch,) from scores (batch, vocabulary). To stop midway, stop iterating.
    """
    limit = min(max_length or checkpoint.max_length, checkpoint.max_length, session.limits.total)
    check_prompts(session, prompts, limit)
    eop, pad = int(checkpoint.config["eos_token_id"]), int(checkpoint.config["pad_token_id"])
    call = feeds.prefill(checkpoint, prompts)
    open_rows = np.ones(len(prompts), dtype=np.bool_)
    session.reset()
    is_greedy = choose is take_best or getattr(choose, "is_greedy", False)
    following: Generator[np.ndarray] | None = None
    try:
        for _ in range(max(len(prompt) for prompt in prompts), limit):
            if following is None:
                chosen = choose(session.step(call))
                following = session.follow() if is_greedy else None  # if it can, it feeds itself from here on
            if following is not None:
                chosen = next(following)
            tokens = np.where(open_rows, chosen, pad)
            open_rows &= tokens != eop
            if not open_rows.any():
                return
            yield [int(token) if is_open else None for token, is_open in zip(tokens, open_rows, strict=True)]
            call = feeds.decode(call, tokens)
    finally:
        if following is not None:
            following.close()


def check_prompts(session: Session, prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Refuse what does not fit, before anything runs."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest:
        raise WorkbookError("there is no prompt to decode: give at least one.")
    if longest >= limit:
        raise WorkbookError(f"the prompt has {longest} tokens, the limit is {limit}: shorten it or drop old rounds.")
    if longest > session.limits.prompt or len(prompts) > session.limits.batch:
        raise WorkbookError(
            f"{len(prompts)} prompts of up to {longest} tokens lie outside the engine's profiles (at most "
            f"{session.limits.batch} of {session.limits.prompt}): shorten them, or build the engine with larger maxima."
        )


def greedy(
    session: Session,
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    *,
    max_length: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Decode one prompt of ids greedily; returns the new ids, <eop> left out.

    max_length: prompt and answer together, `checkpoint.max_length` by default.
    on_token is called with each id as it comes.
    """
    answer: list[int] = []
    for (token,) in generate(session, checkpoint, [prompt], max_length=max_length):
        assert token is not None  # the only row is open, or generate had ended
        answer.append(token)
        if on_token:
            on_token(token)
    return answer
