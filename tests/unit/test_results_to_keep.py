"""What an Idempotency-Key keeps of a commit that also purges."""

from __future__ import annotations

import pytest

from app.autocrud.resource_manager.basic import IdempotentCommit
from app.autocrud.resource_manager.contract.idempotency import results_to_keep

from .metadata import metadata

A, B = metadata("a"), metadata("b")


@pytest.mark.parametrize(
    ("results", "changed", "kept"),
    [
        pytest.param((0,), [("a", False)], [0], id="a change"),
        pytest.param((None,), [("a", True)], [None], id="a purge"),
        pytest.param((0,), [("a", True)], [None], id="the number of a purge"),
        pytest.param((0, None), [("a", False), ("a", True)], [None, None], id="a change before a purge"),
        pytest.param((0, None, 2), [("a", False), ("a", True), ("a", False)], [None, None, 2], id="made again"),
        pytest.param((0, None), [("b", False), ("a", True)], [0, None], id="a purge of another resource"),
        pytest.param((A,), [], [A], id="an operation that changed nothing"),
        pytest.param((A, B, None), [("a", True)], [None, B, None], id="nothing changed, then purged"),
    ],
)
def test_results_of_purged_resources_are_not_kept(results, changed, kept):
    once = IdempotentCommit(key="k", request="r", time=0, results=results)
    assert results_to_keep(once, changed) == kept
