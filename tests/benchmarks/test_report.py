"""The arithmetic and the page of the benchmarks."""

from __future__ import annotations

from benchmarks.report import Cell, markdown, ratio, raw, shown

OURS, PEER = Cell([110, 90, 100], [9000, 10000, 11000]), Cell([300, 250, 275], [])
FAILED = Cell([1], [], failed=3)


def test_a_ratio_is_of_medians_and_above_one_where_we_are_cheaper():
    assert OURS.median == 100
    assert ratio(OURS, PEER) == 2.75
    assert ratio(PEER, OURS) < 1


def test_a_failed_cell_is_never_a_figure():
    assert shown(FAILED) == "FAILED (3 answers)"
    assert shown(OURS) == "100 (10,000/s)"
    table = {"get": {"ours": OURS, "peer": FAILED}}
    assert " x |" not in markdown("T", "", table, "ours", ["ours", "peer"])


def test_the_table_has_a_row_for_each_row_and_a_ratio_for_each_peer():
    page = markdown("T", "note", {"get": {"ours": OURS, "peer": PEER}}, "ours", ["ours", "peer"])
    assert "| get | 100 (10,000/s) | 275 | 2.75 x |" in page
    assert "peer / ours" in page


def test_every_round_is_kept():
    assert "| get | ours | 110 90 100 | 9000 10000 11000 |" in raw("T", {"get": {"ours": OURS}})


def test_small_figures_keep_their_decimals():
    assert shown(Cell([0.277], [])) == "0.28"
    assert "| get | ours | 0.28 1234 |  |" in raw("T", {"get": {"ours": Cell([0.277, 1234.4], [])}})
