"""The plots of notebook 01 say what is seen, hidden and padding, and print no number over another."""

from itertools import combinations
from pathlib import Path

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.display import HIDDEN, PADDING, SEEN
from glmtrt_helpers.inputs.examples import example_inputs, prompt_inputs
from glmtrt_helpers.inputs.plots import draw_mask, draw_positions


def test_a_mask_has_titles_and_a_legend_with_padding(tiny_random: Path) -> None:
    flat = example_inputs(open_checkpoint(tiny_random), 2, 3, 4, padding=(0, 2))
    pieces = [[*(["<pad>"] * padded), *map(str, range(7 - padded))] for padded in (0, 2)]
    figure = draw_mask(flat, pieces)
    for axis in figure.axes:
        assert "sees" in axis.get_ylabel() and "seen" in axis.get_xlabel()
    (legend,) = figure.legends
    colours = dict(zip((SEEN, HIDDEN, PADDING), (text.get_text() for text in legend.get_texts()), strict=True))
    assert colours == {SEEN: "seen", HIDDEN: "hidden", PADDING: "hidden padding"}
    # Two columns of padding in the second row of the batch, and none in the first.
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert (shown[0] < 2).all() and (shown[1][:, :2] == 2).all() and (shown[1][:, 2:] < 2).all()


def test_no_number_of_a_position_is_printed_over_another(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    gmask, sop = (int(checkpoint.config[name]) for name in ("gmask_token_id", "bos_token_id"))
    ids = [5, 6, gmask, sop, 7, 8, 9]
    figure = draw_positions(prompt_inputs(checkpoint, [ids]), list(map(str, ids)))
    figure.canvas.draw()
    (axis,) = figure.axes
    places = [text.get_window_extent() for text in axis.texts]
    assert len(places) == 2 * len(ids) and not any(one.overlaps(other) for one, other in combinations(places, 2))
    assert min(place.y0 for place in places) > axis.get_window_extent().y0
