"""A program that dies at a chosen write to disk, again and again. `test_crash` runs it.

The process imports everything once and forks a child for each step. The child writes to a store through a VFS that
counts the requests of SQLite to the disk. At the chosen request it kills the child with SIGKILL: before the request
(`kill`), or half way through a write (`half`). The child reports each acknowledged write through a pipe. Then another
child opens the store and checks it.

These two modes keep all that was written, as the operating system does if a process is killed. The mode `power` keeps
only what was synced, as a machine does that loses its power: the check runs on copies of the files that were made at
their last sync.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import apsw

from app.autocrud.errors import ResourceNotFound
from app.autocrud.query import Query
from app.autocrud.resource_manager.engine.operations import Create, Update
from app.autocrud.resource_manager.storage_factory import DiskStorageFactory, MemoryDiskStorageFactory
from app.autocrud.testing.model import Item, manage

FACTORIES = {"disk": DiskStorageFactory, "memory-disk": MemoryDiskStorageFactory}


class Steps:
    """Counts the steps up to the one at which the process dies."""

    def __init__(self, last: int, half: bool, durable: tuple[Path, Path] | None) -> None:
        self.last, self.half, self.durable = last, half, durable
        self.count = 0

    def step(self, half_way=None) -> None:
        self.count += 1
        if self.count == self.last:
            if self.half and half_way is not None:
                half_way()
            os.kill(os.getpid(), signal.SIGKILL)

    def synced(self, name: str) -> None:
        if self.durable is not None:
            root, copies = self.durable
            copy = copies / Path(name).relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            # By a rename: another thread may kill the process half way through the copy.
            shutil.copyfile(name, copy.with_name(f"{copy.name}.new"))
            copy.with_name(f"{copy.name}.new").replace(copy)


def install(steps: Steps) -> apsw.VFS:
    class File(apsw.VFSFile):
        def __init__(self, name, flags):
            super().__init__("unix", name, flags)
            self.name = name.filename() if isinstance(name, apsw.URIFilename) else name

        def xWrite(self, data, offset):
            steps.step(lambda: super(File, self).xWrite(data[: len(data) // 2], offset))
            return super().xWrite(data, offset)

        def xTruncate(self, size):
            steps.step()
            return super().xTruncate(size)

        def xSync(self, flags):
            steps.step()
            super().xSync(flags)
            steps.synced(self.name)

    class Disk(apsw.VFS):
        def __init__(self):
            super().__init__("dying", "unix", makedefault=True)

        def xOpen(self, name, flags):
            return File(name, flags)

        def xDelete(self, name, sync):
            steps.step()
            return super().xDelete(name, sync)

    return Disk()


async def work(kind: str, root: Path, say) -> None:
    """Do each kind of write. Call `say` with a line for each write that was acknowledged."""
    manager = manage(FACTORIES[kind](root))
    await manager.open()
    say("opened")

    async def acknowledged(line, write):
        result = await write
        say(line)
        return result

    await acknowledged("create a", manager.create(Item(text="a1", code="1"), resource_id="a"))
    await acknowledged("create d", manager.create(Item(text="d1"), resource_id="d", status="draft"))
    await acknowledged("update a", manager.update("a", Item(text="a2", code="2", tags=["x"])))
    await acknowledged("modify d", manager.modify("d", Item(text="d2")))
    batch = [Create(Item(text="b1"), "b"), Update(resource_id="a", data=Item(text="a3", code="3"))]
    await acknowledged("batch", manager.batch(batch))
    await acknowledged("publish d", manager.publish("d"))
    await acknowledged("switch a", manager.switch("a", 1))
    await asyncio.gather(
        *(acknowledged(f"create g{at}", manager.create(Item(text=f"g{at}"), resource_id=f"g{at}")) for at in range(3))
    )
    await acknowledged("delete b", manager.delete("b"))
    await acknowledged("purge d", manager.purge("d"))
    await manager.maintain(10)
    await manager.close()
    say("closed")


# The states of each resource in order. A state must be found once its line was said, and may be found before that.
STATES = {
    "a": [None, ("create a", "a1", 1, 1), ("update a", "a2", 2, 2), ("batch", "a3", 3, 3), ("switch a", "a1", 4, 3)],
    "b": [None, ("batch", "b1", 1, 1), ("delete b", "b1", 2, 1)],
    "d": [None, ("create d", "d1", 1, 1), ("modify d", "d2", 2, 1), ("publish d", "d2", 3, 1), ("purge d",)],
    **{f"g{at}": [None, (f"create g{at}", f"g{at}", 1, 1)] for at in range(3)},
}


async def check(kind: str, root: Path, said: list[str]) -> None:
    manager = manage(FACTORIES[kind](root))
    await manager.open()
    found = {}
    for rid, states in STATES.items():
        at_least = max(at for at, state in enumerate(states) if state is None or state[0] in said)
        try:
            resource = await manager.get(rid, include_deleted=True)
            meta = resource.meta
            seen = (resource.data.text, meta.version, meta.total_revision_count)
            found[rid] = next(at for at, state in enumerate(states) if state is not None and state[1:] == seen)
            history = (await manager.revisions(rid, include_deleted=True)).items
            assert [info.revision for info in history] == list(range(meta.total_revision_count, 0, -1)), "dense"
            for info in history:
                await manager.get(rid, revision=info.revision, include_deleted=True)
            assert meta.is_deleted == (states[found[rid]][0] == "delete b")
        except ResourceNotFound:
            purged = len(states) - 1 if states[-1] == ("purge d",) and at_least >= len(states) - 2 else 0
            found[rid] = purged
        assert found[rid] >= at_least, f"{rid}: {states[at_least]} was acknowledged, found {states[found[rid]]}"
        assert found[rid] <= at_least + 1, f"{rid}: found {states[found[rid]]}, which was never asked for"
    assert (found["a"] >= 3) == (found["b"] >= 1), "half a batch"
    listed = {hit.meta.resource_id for hit in (await manager.find(Query(include_deleted=True, limit=200))).items}
    assert listed == {rid for rid, at in found.items() if STATES[rid][at] not in (None, ("purge d",))}
    await manager.create(Item(text="after"))
    await manager.maintain(10)
    await manager.maintain(10)
    assert (await manager.search(Query(include_deleted=True))).items
    await manager.close()


def in_child(run) -> int:
    """Run a function in a forked child. Return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def die_at(step: int, kind: str, mode: str, directory: Path, template: Path | None) -> tuple[bool, str]:
    """Run one child up to a step, and check what it left.

    Return whether the work ended before the step, and what is wrong, or "".
    """
    root, copies = directory / "root", directory / "copies"
    for path in (root, copies):
        shutil.rmtree(path, ignore_errors=True)
        if template is None:
            path.mkdir()
        else:
            shutil.copytree(template, path)
    reading, writing = os.pipe()

    def live():
        durable = (root, copies) if mode == "power" else None
        disk = install(Steps(step, mode == "half", durable))
        asyncio.run(work(kind, root, lambda line: os.write(writing, f"{line}\n".encode())))
        del disk

    status = in_child(live)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().splitlines()
    if status not in (0, signal.SIGKILL):
        return True, "the work itself failed"
    left = copies if mode == "power" else root
    if in_child(lambda: asyncio.run(check(kind, left, said))) != 0:
        return True, f"after {said[-1] if said else 'nothing'}"
    return status == 0, ""


def main() -> None:
    kind, mode, start, directory = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
    template = None
    if start == "opened":
        template = directory / "template"

        def prepare():
            async def opened():
                manager = manage(FACTORIES[kind](template))
                await manager.create(Item(), resource_id="first")
                await manager.purge("first")
                await manager.close()

            asyncio.run(opened())

        assert in_child(prepare) == 0
    step, stride = int(sys.argv[5]), int(sys.argv[6])
    failures = []
    while True:
        done, wrong = die_at(step, kind, mode, directory, template)
        if wrong:
            failures.append(f"step {step}: {wrong}")
        if done:
            break
        step += stride
    print(json.dumps({"steps": step, "failures": failures}))


if __name__ == "__main__":
    main()
