"""Padding is left out of an error, what is not finite never is, and fp16 is measured by PyTorch's own error."""

import pytest
import torch

from glmtrt_helpers.graphs.tolerances import largest_error, tolerance


def padded_batch() -> dict[str, torch.Tensor]:
    """Two rows of 3 new tokens on a past of 2; in the second row 3 of the 5 columns are padding."""
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    mask[1, ..., :3] = True
    return {"attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "shape", "padded", "seen"),
    [
        ("logits", (2, 3, 7), (1, 0, 4), (1, 1, 4)),
        ("present.0.key", (5, 2, 4, 8), (2, 1, 0, 0), (3, 1, 0, 0)),
        ("some_hidden_state", (3, 2, 7), (0, 1, 0), (1, 1, 0)),
    ],
)
def test_padding_is_left_out_of_the_error(
    name: str, shape: tuple[int, ...], padded: tuple[int, ...], seen: tuple[int, ...]
) -> None:
    expected = torch.full(shape, 2.0)
    expected[padded] = 100.0
    actual = expected.clone()
    actual[padded] = -50.0
    assert largest_error(name, padded_batch(), expected, actual) == (0.0, 2.0)
    actual[seen] += 0.25
    assert largest_error(name, padded_batch(), expected, actual) == (0.25, 2.0)
    # But what is not finite spreads from anywhere.
    for bad in (float("nan"), float("inf")):
        actual[padded] = bad
        error, _ = largest_error(name, padded_batch(), expected, actual)
        assert error != error


def test_the_fp16_tolerance_is_the_larger_of_two_limits() -> None:
    assert tolerance("fp32", 3.0, None) == pytest.approx(3e-4)
    assert tolerance("fp16", 3.0, 1e-3) == pytest.approx(6e-3)
    assert tolerance("fp16", 3.0, 1e-2) == pytest.approx(1.5e-2)
    assert tolerance("fp16", 3.0, 1e-2, margin=4.0) == pytest.approx(4e-2)
    for useless in (float("inf"), float("nan")):
        assert tolerance("fp16", 3.0, useless) == pytest.approx(6e-3)
