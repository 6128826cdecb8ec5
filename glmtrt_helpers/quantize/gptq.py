"""GPTQ: round the columns of a matrix one after another, and let those that are left make up for each error.

What is kept small is not the error of the weights but that of the products with the inputs X that were recorded, which
H = X^T X measures: an error of one column is spread over the later ones by the rows of the Cholesky factor of H^-1.
Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022,
algorithm 1; without its order by activation, so that the groups stay neighbours.
"""

import numpy as np
import torch

from glmtrt_helpers.quantize.rounding import SMALLEST, round_to_nearest

DAMPING = 0.01  # of the mean of H's diagonal, added to it: few recorded inputs leave H close to singular
BLOCK = 128  # columns whose errors are added up before they are spread over all later ones; groups divide it


def gptq(matrix: torch.Tensor, hessian: torch.Tensor, bits: int, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As `rounding.round_to_nearest`; hessian: X^T X of the inputs, fp32 (k, k), which is overwritten.

    The scale of a group, which divides BLOCK, is that of its weights as they are when its turn comes.
    Raises ValueError for a weight that is not finite, and for inputs that are not.
    """
    round_to_nearest(matrix, bits, group)  # refuses weights that are not finite, and says in which row
    if not hessian.isfinite().all():
        raise ValueError("what it is multiplied with is not finite, so a weight before it may be damaged")
    n, k = matrix.shape
    width, limit = group or k, 2 ** (bits - 1) - 1
    left = matrix.float().clone()
    factor = _inverse_factor(hessian)
    values = torch.empty((n, k), dtype=torch.int8)
    scales = torch.empty((n, k // width))
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        errors = torch.empty((n, last - first))
        for column in range(first, last):
            if column % width == 0:
                # They are up to date: a group lies within a block, whose errors are spread over its columns at once.
                current = left[:, column : column + width]
                scales[:, column // width] = (current.abs().amax(dim=1) / limit).clamp_min(SMALLEST).half().float()
            scale = scales[:, column // width]
            integers = (left[:, column] / scale).round_().clamp_(-limit, limit)
            values[:, column] = integers.to(torch.int8)
            error = (left[:, column] - integers * scale) / factor[column, column]
            left[:, column:last] -= torch.outer(error, factor[column, column:last])
            errors[:, column - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    packed = scales.half().numpy()
    return values.numpy(), np.ascontiguousarray(packed.T) if group else packed[:, 0]


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of H, damped. An input that was always 0 gets a weight of its own."""
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    torch.linalg.cholesky(hessian, out=hessian)
    inverse = torch.cholesky_inverse(hessian)
    return torch.linalg.cholesky(inverse, upper=True)
