"""How the error of a tensor is measured, and how large it may be.

In fp32: 1e-4 of the tensor's largest value. In fp16: 1.5 times the error of PyTorch's own fp16, or 2e-3 of the largest
value if that is more.
"""

from collections.abc import Mapping

import torch

# The error allowed at least, relative to the tensor's largest value; in fp16 also a multiple of PyTorch's own error.
FLOORS = {"fp16": 2e-3, "fp32": 1e-4, "tf32": 1e-3}
MARGIN = 1.5
# One tensor of one layer is a small sample of rounding noise: in correct graphs it reached 2.3 times PyTorch's own
# error, while faults begin at ten times.
LAYER_MARGIN = 4.0


def largest_error(
    name: str, flat: Mapping[str, torch.Tensor], expected: torch.Tensor, actual: torch.Tensor
) -> tuple[float, float]:
    """(largest absolute difference, largest absolute expected value) of a tensor, without its padded positions.

    flat: the inputs, whose mask says what is padding. The values at a padded position mean nothing: no real token
    attends to it, and each backend fills a row that attends to nothing in its own way. They must be finite all the
    same, because a NaN with attention weight 0 is still a NaN: any value that is not finite makes the error NaN.
    """
    if expected.ndim == 4 and not name.startswith("present."):  # a softmax, (batch, heads, sequence, total)
        expected, actual = expected.permute(2, 0, 1, 3), actual.permute(2, 0, 1, 3)
    # The last token attends to everything but padding.
    padded = flat["attention_mask"][:, 0, -1, :].expand(expected.shape[0 if name == "logits" else 1], -1)
    # Logits are (batch, sequence, vocabulary), all else is (sequence or past + sequence, batch, ...).
    keep = ~padded[:, -expected.shape[1] :] if name == "logits" else ~padded[:, -expected.shape[0] :].T
    scale = float(expected[keep].abs().max())
    if not torch.isfinite(actual).all():
        return float("nan"), scale
    return float((actual[keep].float() - expected[keep].float()).abs().max()), scale


def tolerance(dtype: str, scale: float, own_error: float | None, margin: float = MARGIN) -> float:
    """The error allowed for a tensor whose largest value is `scale`.

    own_error: the error of PyTorch's own fp16 there; None in fp32. dtype "tf32" is fp32 whose matmuls round their
    inputs to 10 bits of mantissa, TensorRT's default.
    """
    floor = FLOORS[dtype] * scale * (margin / MARGIN if dtype == "tf32" else 1)
    # Where PyTorch's fp16 overflows, its error is no measure.
    return max(floor, margin * own_error) if own_error is not None and own_error < float("inf") else floor
