"""Sessions: one interface over the backends that run `forward`, and greedy decoding on top of it.

A session maps flat named inputs to flat named outputs (`inputs.input_names`, `inputs.output_names`), torch tensors on
the CPU both ways, so that the same chat runs on PyTorch and on ONNX Runtime and their tokens can be compared.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import onnxruntime
import torch

from glmtrt_helpers import inputs
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError


class Session(Protocol):
    """What decoding needs of a backend. dtype: that of the past, the presents and the logits."""

    dtype: torch.dtype

    def run(self, flat: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One call of forward."""


class TorchSession:
    """The PyTorch model itself."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.dtype = next(model.parameters()).dtype

    def run(self, flat: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return inputs.flat_outputs(self.model(**inputs.forward_kwargs(flat)))


class OrtSession:
    """A bare ONNX Runtime session on the CPU.

    optimize: ONNX Runtime's default optimisations copy fp16 weights into fp32; without them the weights stay mapped.
    extra_outputs: further outputs that the model at `path` declares, beside those of `inputs.output_names`.
    """

    def __init__(self, path: str | Path, *, optimize: bool = True, extra_outputs: Sequence[str] = ()):
        path = Path(path)
        if not path.exists():
            raise WorkbookError(f"{path} is missing: run notebook 03_export_onnx or `glmtrt export {path.parent}`.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, not printed as well
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise WorkbookError(f"ONNX Runtime does not load {path}: {first}; export it again.") from error
        self.input_names = [tensor.name for tensor in self.session.get_inputs()]
        self.output_names = [tensor.name for tensor in self.session.get_outputs()]
        unknown = sorted(set(extra_outputs) - set(self.output_names))
        if unknown:
            raise WorkbookError(f"{path} has no output {unknown[0]!r}: add it to the graph before opening a session.")
        kind = self.session.get_outputs()[0].type
        self.dtype = torch.float16 if kind == "tensor(float16)" else torch.float32

    def run(self, flat: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: flat[name].contiguous().numpy() for name in self.input_names}
        arrays = self.session.run(self.output_names, feeds)
        return {name: torch.from_numpy(array) for name, array in zip(self.output_names, arrays, strict=True)}


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
    limit = min(max_length or checkpoint.max_length, checkpoint.max_length)
    if len(prompt) >= limit:
        raise WorkbookError(
            f"the prompt has {len(prompt)} tokens, the limit is {limit}: shorten it or drop old rounds."
        )
    flat = inputs.prompt_inputs(checkpoint, [prompt], session.dtype)
    answer: list[int] = []
    while len(prompt) + len(answer) < limit:
        outputs = session.run(flat)
        token = outputs["logits"][:, -1].float().argmax(dim=-1)
        if int(token) == int(checkpoint.config["eos_token_id"]):
            break
        answer.append(int(token))
        if on_token:
            on_token(answer[-1])
        flat = inputs.next_inputs(flat, outputs, token)
    return answer
