"""The layered drawing: places are the best ones, lines go down, boxes do not lie on each other."""

import itertools
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from glmtrt_helpers.graphs.layered import Box, _crossings, _order, _ranks, _spread, draw

SVG = "{http://www.w3.org/2000/svg}"
COLOURS = {"plain": "#ffffff", "other": "#cccccc"}


def rectangles(svg: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of the boxes, which have a rounding of 5."""
    found = []
    for element in ElementTree.fromstring(svg).iter(SVG + "rect"):
        if element.get("rx") == "5":
            x, y, w, h = (float(element.get(name) or 0) for name in ("x", "y", "width", "height"))
            found.append((x, y, x + w, y + h))
    return found


def overlapping(svg: str) -> list[tuple[object, object]]:
    return [
        (a, b)
        for a, b in itertools.combinations(rectangles(svg), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


@pytest.mark.parametrize("seed", range(5))
def test_spread_keeps_order_and_gaps_and_is_the_best(seed: int) -> None:
    draw = random.Random(seed)
    wishes = [draw.uniform(0, 20) for _ in range(6)]
    weights = [draw.uniform(0.1, 5) for _ in range(6)]
    gaps = [draw.uniform(1, 4) for _ in range(5)]
    places = _spread(wishes, weights, gaps)

    def cost(xs: list[float]) -> float:
        return sum(w * (x - wish) ** 2 for x, wish, w in zip(xs, wishes, weights, strict=True))

    assert all(b - a >= gap - 1e-9 for (a, b), gap in zip(itertools.pairwise(places), gaps, strict=True))
    # No allowed small move of any run of places is cheaper.
    for first, last in itertools.combinations_with_replacement(range(6), 2):
        for step in (-0.01, 0.01):
            moved = [x + step if first <= i <= last else x for i, x in enumerate(places)]
            if all(b - a >= gap for (a, b), gap in zip(itertools.pairwise(moved), gaps, strict=True)):
                assert cost(moved) >= cost(places) - 1e-9


def test_ranks_go_down_sources_wait_and_sinks_do_not() -> None:
    keys = ("a", "b", "c", "d", "end", "late", "sink", "beside")
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "end"), ("late", "d"), ("b", "sink"), ("late", "beside")]
    ranks = _ranks({key: Box((key,), "plain") for key in keys}, edges)
    assert ranks == {"a": 0, "b": 1, "c": 2, "d": 3, "end": 4, "late": 2, "sink": 2, "beside": 3}
    # Who is read by sinks alone waits for the first of them.
    few = {key: Box((key,), "plain") for key in "abcz"}
    assert _ranks(few, [("a", "b"), ("b", "z"), ("c", "z")]) == {"a": 0, "b": 1, "c": 1, "z": 2}


def test_order_leaves_no_crossing_where_none_is_needed() -> None:
    rows = [["a", "b", "c", "d"], ["w", "x", "y", "z"]]
    edges = [("a", "y"), ("b", "w"), ("c", "z"), ("d", "x")]
    below = {start: [end] for start, end in edges}
    assert _crossings(rows, below) == 3
    assert _crossings(_order(rows, edges), below) == 0


def test_text_stays_inside_its_box() -> None:
    lines = ("a rather long first line in bold", "two", "three", "four")
    svg = draw({"a": Box(lines, "plain"), "b": Box(lines[::-1], "plain")}, [("a", "b")], COLOURS, "")
    texts = [element for element in ElementTree.fromstring(svg).iter(SVG + "text") if element.get("text-anchor")]
    assert [text.text for text in texts] == [*lines, *lines[::-1]]
    for i, (left, top, right, bottom) in enumerate(rectangles(svg)):
        for text in texts[4 * i : 4 * i + 4]:
            # DejaVu Sans is about 0.66 of its size wide in bold, 0.58 in plain.
            half = len(text.text or "") * (0.66 * 11.5 if text.get("font-weight") else 0.58 * 10) / 2
            assert left <= float(text.get("x") or 0) - half and float(text.get("x") or 0) + half <= right
            assert top + 8 <= float(text.get("y") or 0) <= bottom - 4


@pytest.mark.parametrize("seed", range(4))
def test_drawings_of_random_graphs_are_in_order(seed: int) -> None:
    draw = random.Random(seed)
    keys = [f"k{i}" for i in range(25)]
    boxes = {key: Box((key, "x" * draw.randrange(30), "<&>"), draw.choice(list(COLOURS))) for key in keys}
    edges = [(keys[draw.randrange(i)], keys[i]) for i in range(1, 25) for _ in range(draw.randrange(1, 3))]
    edges = list(dict.fromkeys(edges))
    svg = draw(boxes, edges, COLOURS, "random & drawn")
    assert svg == draw(boxes, edges, COLOURS, "random & drawn")
    assert len(rectangles(svg)) == 25 and not overlapping(svg)
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    assert all(left >= 0 and right <= width and bottom <= height for left, _, right, bottom in rectangles(svg))
    lines = [path.get("d") or "" for path in root.iter(SVG + "path") if path.get("marker-end")]
    assert len(lines) == len(edges)
    for line in lines:
        heights = [float(y) for y in re.findall(r",(-?[\d.]+)", line)]
        assert heights == sorted(heights) and heights[0] < heights[-1]


def test_lines_begin_and_end_at_their_boxes() -> None:
    boxes = {key: Box((key * 8,), "plain") for key in "abcd"}
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    svg = draw(boxes, edges, COLOURS, "")
    place = dict(zip("abcd", rectangles(svg), strict=True))
    lines = [p.get("d") or "" for p in ElementTree.fromstring(svg).iter(SVG + "path") if p.get("marker-end")]
    for (start, end), line in zip(edges, lines, strict=True):
        points = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", line)]
        assert place[start][0] <= points[0][0] <= place[start][2] and abs(points[0][1] - place[start][3]) < 0.2
        assert place[end][0] <= points[-1][0] <= place[end][2] and abs(points[-1][1] - place[end][1]) < 0.2
