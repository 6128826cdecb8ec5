"""A small layered drawing of boxes and arrows as SVG, after Sugiyama: ranks, order, places, ink.

No program beside Python is needed for it, and the same graph always gives the same picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Edge = tuple[str, str]
_BOLD, _CHARACTER, _LINE, _PAD = 7.8, 6.2, 15.0, 9.0  # a bold character, a plain one, a line, the border
_BETWEEN, _RANK_GAP, _MARGIN = 22.0, 38.0, 16.0
_INK, _ARROW = "#222222", "#6b7280"


@dataclass(frozen=True)
class Box:
    """A box of text. lines: the first is set in bold. kind: a key of the colours."""

    lines: tuple[str, ...]
    kind: str

    @property
    def width(self) -> float:
        bold, plain = len(self.lines[0]) * _BOLD, max((len(line) for line in self.lines[1:]), default=0) * _CHARACTER
        return max(bold, plain) + 2 * _PAD

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PAD - 4


def draw(boxes: Mapping[str, Box], edges: Sequence[Edge], colours: Mapping[str, str], title: str) -> str:
    """An SVG document: boxes by key, edges between keys (without cycles), a colour for every kind, in legend order."""
    ranks = _ranks(boxes, edges)
    rows, links = _with_waypoints(ranks, edges)
    rows = _order(rows, links)
    widths = {key: boxes[key].width if key in boxes else 2.0 for row in rows for key in row}
    x = _columns(rows, links, widths)
    return _svg(boxes, edges, rows, x, colours, title)


def _neighbours(edges: Sequence[Edge]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(keys above, keys below) of every key."""
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for start, end in edges:
        above.setdefault(end, []).append(start)
        below.setdefault(start, []).append(end)
    return above, below


def _ranks(boxes: Mapping[str, Box], edges: Sequence[Edge]) -> dict[str, int]:
    """Rank by the longest path from a source; then all that can wait moves down to its readers, sinks stay high."""
    above, below = _neighbours(edges)
    rank: dict[str, int] = {}

    def longest(key: str) -> int:
        if key not in rank:
            rank[key] = 1 + max((longest(other) for other in above.get(key, ())), default=-1)
        return rank[key]

    for key in sorted(sorted(boxes), key=longest, reverse=True):
        readers = [other for other in below.get(key, ()) if other in below] or below.get(key)
        if readers:  # a sink holds nobody up who has other readers
            rank[key] = min(rank[other] for other in readers) - 1
    for key in boxes:
        if key not in below:
            rank[key] = 1 + max((rank[other] for other in above.get(key, ())), default=-1)
    lowest = min(rank.values())
    return {key: value - lowest for key, value in rank.items()}


def _with_waypoints(ranks: Mapping[str, int], edges: Sequence[Edge]) -> tuple[list[list[str]], list[Edge]]:
    """Rows of keys, and edges cut at every rank they cross: a waypoint `start>end@rank` holds the place of the line."""
    rows: list[list[str]] = [[] for _ in range(max(ranks.values()) + 1)]
    for key, rank in ranks.items():
        rows[rank].append(key)
    links = []
    for start, end in edges:
        chain = [start]
        for rank in range(ranks[start] + 1, ranks[end]):
            chain.append(f"{start}>{end}@{rank}")
            rows[rank].append(chain[-1])
        links += list(zip(chain, [*chain[1:], end], strict=True))
    return rows, links


def _order(rows: list[list[str]], links: Sequence[Edge]) -> list[list[str]]:
    """The order of each row that crosses least, of those found from a few beginnings."""
    _, below = _neighbours(links)
    beginnings = (rows, [row[::-1] for row in rows], [sorted(row) for row in rows], [sorted(row)[::-1] for row in rows])
    found = [_swap_neighbours(_sweep(beginning, links), below) for beginning in beginnings]
    return min(found, key=lambda one: _crossings(one, below))


def _sweep(rows: list[list[str]], links: Sequence[Edge], sweeps: int = 24) -> list[list[str]]:
    """Order each row by the mean place of its neighbours, down and up in turn; keep what crosses least."""
    above, below = _neighbours(links)
    current = [list(row) for row in rows]
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(sweeps):
        near, path = (above, current) if sweep % 2 == 0 else (below, current[::-1])
        place: dict[str, float] = {}
        for row in path:
            means = {}
            for i, key in enumerate(row):
                known = [place[other] for other in near.get(key, ()) if other in place]
                means[key] = sum(known) / len(known) if known else i / max(len(row) - 1, 1)
            row.sort(key=means.__getitem__)
            # Places run from 0 to 1, so that rows of different lengths can be compared.
            place |= {key: i / max(len(row) - 1, 1) for i, key in enumerate(row)}
        crossings = _crossings(current, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in current], crossings
    return best


def _swap_neighbours(rows: list[list[str]], below: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Change places of two neighbours wherever that leaves fewer crossings, until it helps nowhere."""
    fewest, before = _crossings(rows, below), -1
    while fewest != before:
        before = fewest
        for row in rows:
            for i in range(len(row) - 1):
                row[i], row[i + 1] = row[i + 1], row[i]
                crossings = _crossings(rows, below)
                if crossings < fewest:
                    fewest = crossings
                else:
                    row[i], row[i + 1] = row[i + 1], row[i]
    return rows


def _crossings(rows: Sequence[Sequence[str]], below: Mapping[str, Sequence[str]]) -> int:
    total = 0
    for upper, lower in pairwise(rows):
        place = {key: i for i, key in enumerate(lower)}
        ends = [place[other] for key in upper for other in sorted(below.get(key, ()), key=lambda k: place.get(k, 0))]
        total += sum(left > right for i, left in enumerate(ends) for right in ends[i + 1 :])
    return total


def _columns(rows: Sequence[Sequence[str]], links: Sequence[Edge], widths: Mapping[str, float]) -> dict[str, float]:
    """x of every key's middle, such that the lines are as short and as upright as order and widths allow.

    The sum of the squared sideways steps of all lines is brought down row by row: given the rows around it, the best
    places of a row are known exactly. Steps between waypoints count more, so that long lines run straight.
    """
    pulls: dict[str, list[tuple[str, float]]] = {}
    for start, end in links:
        pull = (1.0, 2.0, 8.0)[("@" in start) + ("@" in end)]
        pulls.setdefault(start, []).append((end, pull))
        pulls.setdefault(end, []).append((start, pull))
    x: dict[str, float] = {}
    for row in rows:
        x |= dict(zip(row, _spread([0.0] * len(row), [1.0] * len(row), _gaps(row, widths)), strict=True))
    for sweep in range(200):
        for row in rows if sweep % 2 == 0 else rows[::-1]:
            weights = [sum(pull for _, pull in pulls[key]) for key in row]
            sums = [sum(pull * x[other] for other, pull in pulls[key]) for key in row]
            wishes = [total / weight for total, weight in zip(sums, weights, strict=True)]
            x |= dict(zip(row, _spread(wishes, weights, _gaps(row, widths)), strict=True))
    left = min(x[key] - widths[key] / 2 for key in x)
    return {key: value - left + _MARGIN for key, value in x.items()}


def _gaps(row: Sequence[str], widths: Mapping[str, float]) -> list[float]:
    """Least distance between the middles of each key of a row and the next."""
    return [(widths[a] + widths[b]) / 2 + _BETWEEN for a, b in pairwise(row)]


def _spread(wishes: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Places as near as possible to the wishes (least squares), in their order and at least the gaps apart.

    Less the gaps so far, places must only not fall: isotonic regression, which merging neighbours solves exactly.
    """
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    blocks: list[list[float]] = []  # [mean, weight, members]
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        blocks.append([wish - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight, members = blocks.pop()
            total = blocks[-1][1] + weight
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * weight) / total, total, blocks[-1][2] + members]
    levels = [mean for mean, _, members in blocks for _ in range(int(members))]
    return [level + offset for level, offset in zip(levels, offsets, strict=True)]


def _svg(
    boxes: Mapping[str, Box],
    edges: Sequence[Edge],
    rows: Sequence[Sequence[str]],
    x: Mapping[str, float],
    colours: Mapping[str, str],
    title: str,
) -> str:
    tops, y = [], _MARGIN + 54  # title and legend stand above
    for row in rows:
        tops.append(y)
        y += max((boxes[key].height for key in row if key in boxes), default=0.0) + _RANK_GAP
    bottoms = [top - _RANK_GAP for top in tops[1:]] + [y - _RANK_GAP]
    rank = {key: i for i, row in enumerate(rows) for key in row}
    width = max(x[key] + (boxes[key].width / 2 if key in boxes else 0) for key in x) + _MARGIN
    legend, legend_width = _legend(
        [kind for kind in colours if any(box.kind == kind for box in boxes.values())], colours
    )
    width = max(width, legend_width, len(title) * 8 + 2 * _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y - _RANK_GAP + _MARGIN:.0f}" '
        f'width="{width:.0f}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="11.5">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{_ARROW}"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_MARGIN:.0f}" y="26" font-size="15" font-weight="bold" fill="{_INK}">{escape(title)}</text>',
        legend,
    ]
    parts += [_arrow(edge, boxes, edges, x, rank, tops, bottoms) for edge in edges]
    for key, box in boxes.items():
        parts.append(_box(box, x[key], tops[rank[key]], colours[box.kind]))
    return "\n".join([*parts, "</svg>"])


def _legend(kinds: Sequence[str], colours: Mapping[str, str]) -> tuple[str, float]:
    parts, x = [], _MARGIN
    for kind in kinds:
        parts.append(
            f'<rect x="{x:.0f}" y="38" width="14" height="14" rx="3" fill="{colours[kind]}" stroke="{_ARROW}"/>'
        )
        parts.append(f'<text x="{x + 20:.0f}" y="49" fill="{_INK}">{escape(kind)}</text>')
        x += 20 + len(kind) * 6.8 + 18
    return "".join(parts), x + _MARGIN


def _box(box: Box, x: float, top: float, colour: str) -> str:
    left = x - box.width / 2
    parts = [
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="5" fill="{colour}" '
        f'stroke="{_ARROW}"/>'
    ]
    for i, line in enumerate(box.lines):
        style = 'font-weight="bold" ' if i == 0 else 'font-size="10" '
        at = top + _PAD + 9 + i * _LINE
        parts.append(f'<text {style}x="{x:.1f}" y="{at:.1f}" text-anchor="middle" fill="{_INK}">{escape(line)}</text>')
    return "".join(parts)


def _arrow(
    edge: Edge,
    boxes: Mapping[str, Box],
    edges: Sequence[Edge],
    x: Mapping[str, float],
    rank: Mapping[str, int],
    tops: Sequence[float],
    bottoms: Sequence[float],
) -> str:
    """A line from the lower border of one box to the upper border of another, upright through its waypoints."""
    start, end = edge
    way = [f"{start}>{end}@{i}" for i in range(rank[start] + 1, rank[end])]
    first, last = (way[0], way[-1]) if way else (end, start)
    x0 = _port(x, boxes[start], start, [_toward(e, x, rank, 0) for e in edges if e[0] == start], x[first])
    x1 = _port(x, boxes[end], end, [_toward(e, x, rank, 1) for e in edges if e[1] == end], x[last])
    # Straight down first, for the neighbours in the row may be taller.
    path, here = f"M{x0:.1f},{tops[rank[start]] + boxes[start].height:.1f}", (x0, bottoms[rank[start]])
    path += f" L{here[0]:.1f},{here[1]:.1f}"
    stops = [((x[key], tops[rank[key]]), (x[key], bottoms[rank[key]])) for key in way]
    for into, out in [*stops, ((x1, tops[rank[end]]), None)]:
        half = (here[1] + into[1]) / 2
        path += f" C{here[0]:.1f},{half:.1f} {into[0]:.1f},{half:.1f} {into[0]:.1f},{into[1]:.1f}"
        if out:
            path += f" L{out[0]:.1f},{out[1]:.1f}"
            here = out
    return f'<path d="{path}" fill="none" stroke="{_ARROW}" stroke-width="1.2" marker-end="url(#tip)"/>'


def _toward(edge: Edge, x: Mapping[str, float], rank: Mapping[str, int], side: int) -> float:
    """x of what an edge meets next, seen from its start (side 0) or its end (side 1)."""
    start, end = edge
    at = rank[start] + 1 if side == 0 else rank[end] - 1
    return x.get(f"{start}>{end}@{at}", x[end] if side == 0 else x[start])


def _port(x: Mapping[str, float], box: Box, key: str, towards: Sequence[float], mine: float) -> float:
    """Where on a box's border a line starts or ends: lines share the border in the order of where they go."""
    place = sorted(towards).index(mine)
    share = min(0.7 * box.width / max(len(towards), 1), 26.0)
    return x[key] + (place - (len(towards) - 1) / 2) * share
