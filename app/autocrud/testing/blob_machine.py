"""The rows of blobs of a store, compared with a model in plain Python after each of many random steps."""

from __future__ import annotations

import asyncio
import copy
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from typing_extensions import override

from ..errors import BlobGone, BlobQuotaExceeded, StaleGeneration
from ..resource_manager.basic import BlobRow, Status
from ..resource_manager.contract.blobs import BlobUsage, BlobUse
from ..resource_manager.engine.operations import (
    Create,
    Delete,
    Modify,
    Operation,
    Publish,
    Purge,
    Restore,
    Retention,
    Switch,
    Update,
)
from ..resource_manager.records import blob_epoch_of
from ..resource_manager.storage_factory import IStorageFactory
from .base import Conformance
from .blobs import CONTENTS, NamedBlobs, blob_rows_of, sha256_of, upload
from .model import Item, manage, storage_of

T = TypeVar("T")

IDS = ("a", "b")
KEPT = 3
"""Retention: how many revisions of a resource are kept."""
STATUSES = st.sampled_from(["draft", "stable"])
STEPS = st.tuples(
    st.sampled_from(["create", "update", "modify", "publish", "switch", "delete", "restore", "purge"]),
    st.sampled_from(IDS),
    STATUSES,
    st.lists(st.integers(0, 11), max_size=2),
)
Step = tuple[str, str, Status, list[int]]


class Planned(NamedTuple):
    """An operation of a batch.

    operation  the operation
    keys       the keys that its record names; None if it stores no record
    refused    whether one of these keys has no row
    """

    operation: Operation
    keys: tuple[str, ...] | None = None
    refused: bool = False


class ModelResource:
    """The state of a resource: the keys and the status of each revision, and the current revision."""

    def __init__(self, status: Status, keys: frozenset[str]) -> None:
        self.revisions: dict[int, tuple[Status, frozenset[str]]] = {1: (status, keys)}
        self.current = self.total = 1
        self.is_deleted = False


class ModelStore:
    """The meaning of BlobRows and of the commits that name blobs, in plain Python."""

    def __init__(self) -> None:
        self.rows: dict[str, BlobRow] = {}
        self.epoch = 0
        self.resources: dict[str, ModelResource] = {}

    def uses(self, key: str) -> list[BlobUse]:
        """Return the newest revision of each resource that names a key."""
        found = []
        for rid, resource in sorted(self.resources.items()):
            numbers = [number for number, (_, keys) in resource.revisions.items() if key in keys]
            found += [BlobUse(rid, max(numbers))] if numbers else []
        return found

    def add(self, row: BlobRow, quota: int | None) -> None:
        """Store a row, or raise the error that the store must raise."""
        if row.key in self.rows:
            return
        if blob_epoch_of(row.key) < self.epoch:
            raise StaleGeneration("expected")
        if quota is not None and sum(one.size for one in self.rows.values()) + row.size > quota:
            raise BlobQuotaExceeded("expected")
        self.rows[row.key] = row

    def remove(self, keys: Sequence[str]) -> list[str]:
        """Remove unused rows, and return the unused keys in the order of `keys`."""
        unused = [key for key in dict.fromkeys(keys) if not self.uses(key)]
        for key in unused:
            if self.rows.pop(key, None) is None:
                self.epoch = max(self.epoch, blob_epoch_of(key) + 1)
        return unused

    def apply(self, step: Step, keys: frozenset[str], number: int) -> Planned | None:
        """Apply one operation that writes data with this number, and return it; None if it is not possible."""
        kind, rid, status, _ = step
        resource = self.resources.get(rid)
        data = Item(number=number)
        if kind == "create" and resource is None:
            self.resources[rid] = ModelResource(status, keys)
            return self._storing(Create(data, rid, status), keys)
        if resource is None:
            return None
        if kind == "purge":
            del self.resources[rid]
            return Planned(Purge(resource_id=rid))
        if kind in ("delete", "restore") and resource.is_deleted is (kind == "restore"):
            resource.is_deleted = kind == "delete"
            return Planned((Delete if kind == "delete" else Restore)(resource_id=rid))
        if resource.is_deleted:
            return None
        is_draft = resource.revisions[resource.current][0] == "draft"
        match kind:
            case "update":
                resource.total += 1
                resource.current = resource.total
                resource.revisions[resource.total] = (status, keys)
                for expired in [one for one in resource.revisions if one <= resource.total - KEPT]:
                    del resource.revisions[expired]
                return self._storing(Update(resource_id=rid, data=data, status=status), keys)
            case "modify" if is_draft:
                resource.revisions[resource.current] = ("draft", keys)
                return self._storing(Modify(resource_id=rid, data=data), keys)
            case "publish" if is_draft:
                resource.revisions[resource.current] = ("stable", keys)
                return self._storing(Publish(resource_id=rid), keys)
            case "switch" if len(resource.revisions) > 1:
                others = [one for one in resource.revisions if one != resource.current]
                resource.current = others[number % len(others)]
                return Planned(Switch(resource_id=rid, revision=resource.current))
        return None

    def _storing(self, operation: Operation, keys: frozenset[str]) -> Planned:
        return Planned(operation, tuple(keys), refused=not keys <= self.rows.keys())


class BlobMachine(RuleBasedStateMachine):
    """Applies the same steps to a store and to the model. A subclass sets `make` and `restarts`."""

    make: Callable[[Path], IStorageFactory]
    restarts: bool

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._directory = tempfile.TemporaryDirectory()
        self._number = 0
        self._uploads = [upload(content) for content in CONTENTS]
        self._model = ModelStore()
        self._open()

    def _open(self) -> None:
        self._manager = manage(type(self).make(Path(self._directory.name)), retention=Retention(last=KEPT))
        self._run(self._manager.open())
        self._rows, self._names = blob_rows_of(self._manager), NamedBlobs(self._manager.storage)

    def _run(self, work: Awaitable[T]) -> T:
        async def run() -> T:
            return await work

        return self._runner.run(run())

    def _same(self, expected: Callable[[], object], found: Callable[[], Awaitable[object]]) -> None:
        """Compare the result or the error of a step."""
        results: list[Any] = []
        for call in (expected, lambda: self._run(found())):
            try:
                results.append(call())
            except (BlobGone, BlobQuotaExceeded, StaleGeneration) as error:
                results.append(type(error))
        assert results[0] == results[1]

    @rule(content=st.sampled_from(CONTENTS), earlier=st.integers(0, 2), quota=st.none() | st.integers(0, 12))
    def add(self, content: bytes, earlier: int, quota: int | None) -> None:
        """Store the row of a new upload, of the present epoch or an earlier one."""
        row = upload(content, epoch=max(0, self._model.epoch - earlier))
        self._uploads.append(row)
        self._same(lambda: self._model.add(row, quota), lambda: self._rows.add_blob(row, quota=quota))

    @rule(at=st.integers(0, 11))
    def add_again(self, at: int) -> None:
        """Store a row that may be stored already, or may have been removed."""
        row = self._upload(at)
        self._same(lambda: self._model.add(row, None), lambda: self._rows.add_blob(row))

    @rule(at=st.lists(st.integers(0, 11), max_size=4))
    def remove(self, at: list[int]) -> None:
        """Remove rows that may be in use or missing."""
        keys = [self._upload(one).key for one in at]
        self._same(lambda: self._model.remove(keys), lambda: self._rows.remove_blobs(keys))

    @rule(steps=st.lists(STEPS, min_size=1, max_size=4))
    def commit(self, steps: list[Step]) -> None:
        """Commit one or several operations at once, each with keys of its own."""
        before, planned = copy.deepcopy(self._model), []
        named: dict[str, set[str]] = {}  # all keys that a resource ever named, up to this commit
        for rid, resource in self._model.resources.items():
            named[rid] = {key for _, keys in resource.revisions.values() for key in keys}
        for step in steps:
            self._number += 1
            keys = frozenset(self._upload(at).key for at in step[3])
            if (one := self._model.apply(step, keys, self._number)) is not None:
                planned.append(one)
                named.setdefault(step[1], set()).update(one.keys or ())
        if not planned:
            return
        self._names.in_order = [one.keys for one in planned if one.keys is not None]
        refused = any(one.refused for one in planned)
        try:
            self._run(self._manager.batch([one.operation for one in planned]))
        except BlobGone:
            assert refused
            self._model = before
        else:
            assert not refused
            if storage_of(self._manager).blob_store is not None:  # a purge releases files
                purged = [one.operation.resource_id for one in planned if isinstance(one.operation, Purge)]
                self._model.remove([key for rid in purged for key in named[rid]])

    @precondition(lambda self: self.restarts)
    @rule()
    def restart(self) -> None:
        """Close the store and open it again."""
        self._run(self._manager.close())
        self._open()

    @invariant()
    def rows_uses_and_epoch_are_those_of_the_model(self) -> None:
        """Compare everything that the store tells about blobs."""
        self._run(self._compare())

    async def _compare(self) -> None:
        model, rows = self._model, self._rows
        stored = sorted(model.rows.values(), key=lambda row: row.key)
        assert await rows.blobs([sha256_of(content) for content in CONTENTS]) == stored
        assert await rows.blob_usage() == BlobUsage(len(stored), sum(row.size for row in stored))
        assert await rows.blob_epoch() == model.epoch
        for row in self._uploads:
            assert await rows.blob_uses(row.key) == model.uses(row.key)
        for rid, resource in model.resources.items():
            record = await self._manager.storage.revision(rid, resource.current)
            assert frozenset(record.blobs) == resource.revisions[resource.current][1]

    @override
    def teardown(self) -> None:
        self._run(self._manager.close())
        self._runner.close()
        self._directory.cleanup()

    def _upload(self, at: int) -> BlobRow:
        return self._uploads[-1 - at % len(self._uploads)]


class BlobMachineConformance(Conformance):
    """The rows of blobs after random steps."""

    blob_examples: ClassVar[int] = 6
    """How many sequences of steps are tried."""

    def test_rows_and_uses_are_those_of_a_plain_model(self, root: Path) -> None:
        blob_rows_of(manage(self.make(root)))
        machine = type("Machine", (BlobMachine,), {"make": staticmethod(self.make), "restarts": self.durable})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=self.blob_examples,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,
            ),
        )
