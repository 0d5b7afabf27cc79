"""From samples to a page: medians, ratios, RESULTS.md. No I/O here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """One peer in one row: CPU microseconds (or milliseconds) of every round, and requests per second, if measured."""

    cpu: list[float]
    per_second: list[float]
    failed: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.cpu)


Table = Mapping[str, Mapping[str, Cell]]  # row -> peer -> cell


def ratio(ours: Cell, other: Cell) -> float:
    """How many times as much the other needs; above 1 we are cheaper."""
    return other.median / ours.median


def shown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.failed:
        return f"FAILED ({cell.failed} answers)"
    speed = f" ({statistics.median(cell.per_second):,.0f}/s)" if cell.per_second else ""
    return f"{_number(cell.median)}{speed}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def shown_ratio(ours: Cell | None, other: Cell | None) -> str:
    if ours is None or other is None or ours.failed or other.failed:
        return ""
    return f"{ratio(ours, other):.2f} x"


def markdown(title: str, note: str, table: Table, ours: str, peers: Sequence[str]) -> str:
    """A section: a row each, our figure, each peer's, and each peer's as a multiple of ours."""
    others = [peer for peer in peers if peer != ours]
    head = ["", ours, *others, *(f"{peer} / {ours}" for peer in others)]
    lines = [f"## {title}", "", note, "", _line(head), _line(["---"] * len(head))]
    for row, cells in table.items():
        mine = cells.get(ours)
        figures = [shown(cells.get(peer)) for peer in others]
        lines.append(_line([row, shown(mine), *figures, *(shown_ratio(mine, cells.get(peer)) for peer in others)]))
    return "\n".join(lines) + "\n"


def raw(title: str, table: Table) -> str:
    """Return every round of every cell, which shows the variation."""
    lines = [
        f"### {title}",
        "",
        _line(["row", "peer", "CPU of each round", "requests a second of each round"]),
        _line(["---"] * 4),
    ]
    for row, cells in table.items():
        for peer, cell in cells.items():
            cpu = " ".join(_number(value).replace(",", "") for value in cell.cpu)
            lines.append(_line([row, peer, cpu, " ".join(f"{value:.0f}" for value in cell.per_second)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
