"""Programs for tests of BlobStores: `python -m tests.stores.blob_worker COMMAND ROOT ...`.

upload  uploads blobs, deletes some of them, and prints "stored KEY" or "deleted KEY" after each acknowledgement
hang    writes half an upload to a store, prints the name of its temporary file, and waits
memory  stores one blob of so many MB and reads it, and prints by how many MB the memory of the process grew
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from pathlib import Path

from app.autocrud.resource_manager.backends.s3.memory_object_store import MemoryObjectStore
from app.autocrud.resource_manager.basic import BlobStore
from app.autocrud.resource_manager.blob_store.s3 import S3BlobStore
from app.autocrud.resource_manager.blob_store.simple import DiskBlobStore
from app.autocrud.testing.blob_stores import new_uid

MB = 1024**2


async def upload(root: str, seed: str) -> None:
    store, rng, keys = DiskBlobStore(root), random.Random(seed), []
    while True:
        content = rng.choice([b"", b"same", rng.randbytes(rng.randrange(1, 600_000))])
        async with store.receive() as writer:
            await writer.write(content)
            keys.append(await writer.store(new_uid()))
        os.write(1, f"stored {keys[-1]}\n".encode())
        if rng.random() < 0.4:
            key = keys.pop(rng.randrange(len(keys)))
            os.write(1, f"deletes {key}\n".encode())
            await store.delete([key])
            os.write(1, f"deleted {key}\n".encode())


async def hang(root: str) -> None:
    store = DiskBlobStore(root) if root != "s3" else S3BlobStore("double", "p/", object_store=MemoryObjectStore())
    async with store.receive() as writer:
        await writer.write(bytes(MB))
        await asyncio.to_thread(lambda: None)
        print(writer._spool._path, flush=True)
        sys.stdin.read()


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


async def memory(root: str, megabytes: str) -> None:
    store: BlobStore
    if "TEST_SEAWEED" in os.environ and root.startswith("s3:"):
        store = S3BlobStore("tests", root[3:], *json.loads(os.environ["TEST_SEAWEED"]), "us-east-1")
    else:
        store = DiskBlobStore(root)
    warm = os.urandom(MB)

    async def once(size: int) -> None:
        async with store.receive() as writer:
            for _ in range(size):
                await writer.write(warm)
            key = await writer.store(new_uid())
        received = 0
        async for chunk in store.read(key):
            received += len(chunk)
        assert received == size * MB
        await store.delete([key])

    await once(1)
    before = peak_mb()
    await once(int(megabytes))
    print(peak_mb() - before, flush=True)


if __name__ == "__main__":
    tempfile.tempdir = os.environ.get("TEST_TEMP")
    asyncio.run({"upload": upload, "hang": hang, "memory": memory}[sys.argv[1]](*sys.argv[2:]))
