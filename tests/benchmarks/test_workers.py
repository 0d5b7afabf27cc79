"""What becomes of the answers of the processes that are measured."""

from __future__ import annotations

from app.settings import KINDS, Pair, parse_storage
from benchmarks import backends
from benchmarks.backends import expected, storage_of
from benchmarks.report import shown
from benchmarks.scripts.asking import LEAST, measured
from benchmarks.workers import Figures

SAMPLE = {"wall": 20.0, "cpu": 10.0, "calls": 7, "answer": 1}


def test_a_wrong_answer_is_no_figure():
    figures = Figures.none()
    figures.add("get", "ours", SAMPLE, expected=1)
    figures.add("get", "peer", SAMPLE, expected=1)
    figures.add("get", "peer", SAMPLE | {"answer": 2}, expected=1)
    assert shown(figures.wall["get"]["ours"]) == "20"
    assert shown(figures.cpu["get"]["peer"]) == "FAILED (1 answers)"


def test_every_kind_is_measured_and_a_pair_is_written_with_a_plus():
    assert set(KINDS) <= backends.KINDS.keys() | backends.WITH_BROKER.keys()
    for kind in backends.KINDS | backends.WITH_BROKER:
        storage = parse_storage(storage_of(kind), kind)
        assert f"{storage.meta} + {storage.resource}" == kind if isinstance(storage, Pair) else storage == kind


def test_the_calls_of_all_rounds_are_told():
    figures = Figures.none()
    for _ in range(3):
        figures.add("get", "ours", SAMPLE, expected=1)
    assert list(figures.with_calls(figures.wall)["get"]) == ["ours, 21 calls"]
    assert figures.server == {}


def test_the_truth_comes_from_the_articles():
    truth = expected(100_000)
    assert truth["range + sort"] == [9999] * 10 + [9998] * 10
    assert truth["count"] == 100_000


async def test_calls_are_numbered_after_one_that_is_not_counted():
    asked = []
    found = await measured(asked.append, 0.0)
    assert found["calls"] >= LEAST
    assert asked == [0, *range(found["calls"])]


async def test_async_functions_are_awaited():
    done = []

    async def call(at):
        done.append(at)

    found = await measured(call, 0.0)
    assert len(done) == found["calls"] + 1
