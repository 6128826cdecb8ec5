"""Round-to-nearest: every weight becomes the nearest multiple of its group's scale."""

import numpy as np
import torch

ROWS = 2048  # rows that are worked on at a time, so that memory does not depend on the matrix
SMALLEST = 2.0**-24  # of fp16 above 0: the scale of a group of zeros


def round_to_nearest(matrix: torch.Tensor, bits: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The integers of a matrix (n, k), int8 (n, k), and their scales, fp16 (k / group, n), or (n,) without groups.

    Symmetric, as the published files are: scale = max|w| / (2^(bits-1) - 1), and no integer is below -(2^(bits-1) - 1).
    group: neighbours in a row that share a scale; 0: a whole row does. k is to be a multiple of it.
    Raises ValueError for a weight that is not finite.
    """
    n, k = matrix.shape
    width, limit = group or k, 2 ** (bits - 1) - 1
    values, scales = np.empty((n, k), np.int8), np.empty((n, k // width), np.float16)
    for first in range(0, n, ROWS):
        rows = matrix[first : first + ROWS].float().reshape(-1, k // width, width)
        scale = (rows.abs().amax(dim=-1, keepdim=True) / limit).clamp_min(SMALLEST).half()
        if not scale.isfinite().all():
            row = first + int((~scale.isfinite()).any(dim=1).nonzero()[0, 0])
            raise ValueError(f"row {row} has a weight that is not finite, or too large for a scale in fp16")
        integers = (rows / scale.float()).round_().clamp_(-limit, limit)
        values[first : first + ROWS] = integers.to(torch.int8).reshape(-1, k).numpy()
        scales[first : first + ROWS] = scale[..., 0].numpy()
    return values, np.ascontiguousarray(scales.T) if group else scales[:, 0]
