"""Load the model of a checkpoint: whole, on the meta device, or streamed where it does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from glmtrt_helpers.checkpoints import packing, remote_code, shards
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.precisions import PRECISIONS

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.name) for name, dtype in PRECISIONS.items()}


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    *,
    code: Path | None = None,
    meta: bool = False,
) -> torch.nn.Module:
    """The checkpoint's own ChatGLMForConditionalGeneration, in eval mode on the CPU.

    dtype: what the weights are cast to, fp32 by default; in the stored dtype they stay mapped from the shards.
    code: another source than the checkpoint's `modeling_chatglm.py`.
    meta: no weights are read, parameters are on the meta device.
    inv_freq is computed, as upstream does it: rounded to fp16, then cast to dtype.
    Raises WorkbookError for remote code that cannot be imported or does not fit the weights.
    """
    dtype = dtype or torch.float32
    source = code or checkpoint.code
    model, _ = remote_code.build_model(checkpoint.directory, source, checkpoint.config, dtype)
    if not meta:
        names = [name for name, _ in model.named_parameters()]
        unknown = sorted(set(names) - set(checkpoint.tensors))
        if unknown:
            raise WorkbookError(
                f"{source} has a parameter {unknown[0]!r} that no shard holds: source and weights differ in kind."
            )
        model.load_state_dict(read_tensors(checkpoint, names, dtype), strict=False, assign=True)
    return model.eval()


def read_tensors(checkpoint: Checkpoint, names: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The named weights in dtype; one that is stored in dtype is a view of the mapped file, not a copy.

    Packed weights are dequantised.
    """
    with ExitStack() as opened:
        files: dict[Path, Callable[[str], torch.Tensor]] = {}

        def read(name: str) -> torch.Tensor:
            stored = checkpoint.tensors[name]
            if stored.file not in files:
                files[stored.file] = (
                    opened.enter_context(safe_open(stored.file, framework="pt")).get_tensor
                    if stored.file.suffix == ".safetensors"
                    else shards.load_bin(stored.file).__getitem__
                )
            return files[stored.file](stored.name)

        def weight(name: str) -> torch.Tensor:
            if name not in checkpoint.packed:
                return read(name).to(dtype)
            stored, scale = (read(each).numpy() for each in (name, packing.scale_name(name)))
            width = np.float16 if dtype == torch.float16 else np.float32
            return torch.from_numpy(packing.dequantize(stored, scale, checkpoint.packed[name], width)).to(dtype)

        return {name: weight(name) for name in names}


def load_streamed(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """`load_model`, but a layer or a vocabulary matrix is read when it is called and freed after it.

    Every call of the model reads all weights: for comparing, not for chatting. Results are those of the whole model.
    """
    model = load_model(checkpoint, dtype, meta=True, **options)
    layers = [name for name, _ in model.named_modules() if _is_layer(name)]
    outside = {
        name.rpartition(".")[0]
        for name, _ in model.named_parameters()
        if not any(name.startswith(layer + ".") for layer in layers)
    }
    for name in (*layers, *sorted(outside)):
        _stream(model.get_submodule(name), name, checkpoint, dtype)
    return model


def load_bounded(checkpoint: Checkpoint, dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """The model within a laptop's memory: a large one is streamed where its weights cannot stay mapped.

    Those of fp16 can, in fp16; packed ones cannot.
    """
    mapped = dtype == torch.float16 and not checkpoint.packed
    load = load_streamed if checkpoint.is_large and not mapped else load_model
    return load(checkpoint, dtype, **options)


def _is_layer(name: str) -> bool:
    parent, _, number = name.rpartition(".")
    return number.isdigit() and parent.endswith("layers")


def _stream(module: torch.nn.Module, name: str, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    own = [parameter for parameter, _ in module.named_parameters()]

    def read(*_: Any) -> None:
        tensors = read_tensors(checkpoint, [f"{name}.{parameter}" for parameter in own], dtype)
        module.load_state_dict({p: tensors[f"{name}.{p}"] for p in own}, strict=False, assign=True)

    def free(*_: Any) -> None:
        empty = {parameter: tensor.to("meta") for parameter, tensor in module.named_parameters()}
        module.load_state_dict(empty, strict=False, assign=True)

    module.register_forward_pre_hook(read)
    module.register_forward_hook(free, always_call=True)
