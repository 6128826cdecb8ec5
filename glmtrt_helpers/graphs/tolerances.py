"""TODO."""

from collections.abc import Mapping

import torch

# Allowed error as a part of the largest value of a tensor; in fp16 also so many times PyTorch's own error.
FLOORS = {"fp16": 2e-3, "fp32": 1e-4, "tf32": 1e-3}
MARGIN = 1.5
# One tensor of one layer is a small sample of the noise: of right graphs it was seen to reach 2.3 times PyTorch's own
# error, while faults begin at ten times.
LAYER_MARGIN = 4.0


def largest_error(
    name: str, flat: Mapping[str, torch.Tensor], wanted: torch.Tensor, got: torch.Tensor
) -> tuple[float, float]:
    """Largest difference between two tensors and the largest magnitude of the wanted one, padding left out.

    What stands at a padded position means nothing: no real token ever looks there, and how a row is filled that may
    see nothing at all is each backend's own choice. It must be finite all the same, for a NaN that is looked at with
    weight 0 is still a NaN: anything that is not finite makes the error NaN.
    """
    if wanted.ndim == 4 and not name.startswith("present."):  # a softmax, (batch, heads, sequence, total)
        wanted, got = wanted.permute(2, 0, 1, 3), got.permute(2, 0, 1, 3)
    # The last token sees everything but padding.
    padded = flat["attention_mask"][:, 0, -1, :].expand(wanted.shape[0 if name == "logits" else 1], -1)
    # Logits are (batch, sequence, vocabulary), all else is (sequence or past + sequence, batch, ...).
    keep = ~padded[:, -wanted.shape[1] :] if name == "logits" else ~padded[:, -wanted.shape[0] :].T
    scale = float(wanted[keep].abs().max())
    if not torch.isfinite(got).all():
        return float("nan"), scale
    return float((got[keep].float() - wanted[keep].float()).abs().max()), scale


def tolerance(dtype: str, scale: float, own_error: float | None, margin: float = MARGIN) -> float:
    """The error allowed for a tensor whose largest value is `scale`; own_error: PyTorch fp16's, None in fp32.

    dtype "tf32" is fp32 whose products round their inputs to ten bits, as TensorRT does unless it is told not to.
    """
    floor = FLOORS[dtype] * scale * (margin / MARGIN if dtype == "tf32" else 1)
    # Where PyTorch fp16 itself overflows it is no measure.
    return max(floor, margin * own_error) if own_error is not None and own_error < float("inf") else floor
