"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from glmtrt_helpers.inputs.names import flat_outputs, forward_kwargs
from glmtrt_helpers.sessions.base import Session

if TYPE_CHECKING:
    import torch


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

        tensors = {name: torch.as_tensor(value).to(self.device) for name, value in flat.items()}
        with torch.inference_mode():
            outputs = flat_outputs(self.model(**forward_kwargs(tensors)))
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
