"""The `torch` backend."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from glmtrt_helpers.checkpoints.remote_code import in_remote_code
from glmtrt_helpers.inputs.names import flat_outputs, forward_kwargs, past_names
from glmtrt_helpers.sessions.base import Session


class TorchSession(Session):
    """A PyTorch model, on the device where it is."""

    backend = "torch"

    def __init__(self, model: torch.nn.Module):
        self.model = model
        parameter = next(model.parameters())
        self.dtype = np.dtype(str(parameter.dtype).removeprefix("torch."))
        self.device = "cuda" if parameter.is_cuda else "cpu"  # a streamed model's parameters are on meta

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        config: Any = self.model.config
        shape = (0, batch, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        return {name: np.zeros(shape, self.dtype) for name in past_names(config.num_layers)}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        tensors = {name: torch.as_tensor(value).to(self.device) for name, value in flat.items()}
        with torch.inference_mode(), in_remote_code():
            outputs = flat_outputs(self.model(**forward_kwargs(tensors)))
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
