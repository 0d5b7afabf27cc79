"""Create a store in the bucket, once, and check that the storage honours conditional writes.

Invariant: HEAD and BORN are created once and never again. If a copy has read a HEAD, or if BORN exists without a HEAD,
then HEAD was removed. A new HEAD would start a second history, and a writer that had not noticed the removal could be
acknowledged into it. If BORN was removed, it is written again with the id in the HEAD that was read. If that HEAD is
replaced by one of another store meanwhile, that one is refused, because BORN names another id.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from uuid import uuid4

import apsw
from msgspec.structs import replace

from ....errors import ConditionalWritesUnsupported, ConfigError, HeadLost, StoreUnavailable
from ...basic import Findings
from ..s3.object_store import Object, ObjectStore, Outcome, Stored, Unknown
from ..sqlite import blob_tables
from .copy_files import new_path
from .formats import format_of, restore_copy_table
from .head import Head, Snapshot, snapshot_key

log = logging.getLogger("crudstack.s3sqlite")


class StoreCreation:
    """Creates the store at `key`, together with the other processes that start at the same time."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key, self._prefix = objects, key, f"{key}/"
        self._head_key, self._born_key = f"{key}/HEAD", f"{key}/BORN"
        self._confirmed = ""  # the id that BORN is known to hold

    async def create(self, directory: Path, known: str) -> None:
        """Create HEAD, unless another process creates it first. The caller reads HEAD next, whatever the outcome.

        Raises HeadLost if the store was created before, and ConfigError if the credentials do not allow a PUT.

        Args:
            directory: For temporary files.
            known: The id of the store that this process knows, or "".
        """
        lost = HeadLost(
            f"{self._head_key} is missing, although the store was in use: it was removed; put it back, or remove the"
            " whole store"
        )
        if known:
            raise lost
        if await self._objects.get(self._born_key) is not None:
            # HEAD is created before BORN, so only now a missing HEAD shows that it was removed.
            if await self._objects.get(self._head_key) is None:
                raise lost
            return
        head = await self._imported(directory)
        if head is None:
            head = Head(store=uuid4().hex, nonce=os.urandom(8), findings=Findings(healed=True))
        outcome = await self._objects.put_if(self._head_key, head.encode(), None)
        if isinstance(outcome, Unknown):
            _check_may_write(outcome)  # any other outcome shows when HEAD is read next

    async def _imported(self, directory: Path) -> Head | None:
        """Return a HEAD whose snapshot is the plain database at `key`; None if there is no such object."""
        plain = await self._objects.get(self._key)
        if plain is None:
            return None
        exported, body = await asyncio.get_running_loop().run_in_executor(
            None, lambda: _exported(plain.body, directory, self._key)
        )
        key = snapshot_key(self._prefix, 1, exported.seq)
        await self._objects.put(key, body)
        snapshot = Snapshot(key, exported.seq, len(body), hashlib.sha256(body).hexdigest())
        return replace(exported, snap=snapshot, imported=plain.etag)

    async def record_store_id(self, head: Head) -> None:
        """Write the id of the store to BORN, unless that is done. Called before a HEAD is used or replaced.

        Raises HeadLost if BORN names another store: two HEADs were created, the second one after the first was removed.
        """
        if head.born or self._confirmed == head.store:
            return
        store = head.store.encode()
        outcome = await self._objects.put_if(self._born_key, store, None)
        if not isinstance(outcome, Stored):
            found = await self._objects.get(self._born_key)
            if found is None:
                raise StoreUnavailable("the store could not be created; try again")
            if found.body != store:
                raise HeadLost(f"{self._born_key} names another store than {self._head_key}: a HEAD was removed")
        self._confirmed = head.store

    async def probe(self, store: str) -> None:
        """Check that the storage honours each condition.

        If it ignores one, BORN is overwritten with the bytes that it holds already. Raises ConditionalWritesUnsupported
        if the storage ignores a condition, ConfigError if the credentials do not allow a PUT, or StoreUnavailable if an
        outcome is unknown.
        """
        outcomes = await self._probed(store.encode())
        if isinstance(outcomes[0], Stored):  # BORN was missing and exists now, or the condition was ignored
            outcomes = await self._probed(store.encode())
            if not isinstance(outcomes[0], Stored):
                log.warning("%s was missing and is written again; were objects of the store removed?", self._born_key)
        for condition, outcome in zip(("If-None-Match", "If-Match"), outcomes, strict=True):
            if isinstance(outcome, Stored):
                raise ConditionalWritesUnsupported(
                    f"the object storage ignores {condition}, so writers would overwrite each other; use one that"
                    " honours it (S3 does)"
                )
            if isinstance(outcome, Unknown):
                _check_may_write(outcome)
                raise StoreUnavailable(
                    f"the object storage did not say whether it honours conditions ({outcome.reason}); try again"
                )

    async def _probed(self, body: bytes) -> tuple[Outcome, Outcome]:
        impossible = f'"{"0" * 32}"'
        return await asyncio.gather(
            self._objects.put_if(self._born_key, body, None), self._objects.put_if(self._born_key, body, impossible)
        )

    async def refuse_changed_import(self, head: Head) -> None:
        """Raise ConfigError if the plain database that was imported has changed since."""
        if head.imported is not None:
            found = await self._objects.get_if_changed(self._key, head.imported)
            if isinstance(found, Object):
                raise ConfigError(
                    f"{self._key} has changed since it was imported: an earlier deployment still writes to it; stop it,"
                    " and remove that object"
                )


def _check_may_write(outcome: Unknown) -> None:
    """Raise ConfigError if a PUT was refused because these credentials may not write."""
    if outcome.reason.startswith("403 ") and outcome.reason.endswith("AccessDenied"):  # not: an expired token
        raise ConfigError(
            f"the AWS credentials may read but not write: the object storage answered {outcome.reason} to a PUT; allow"
            " s3:PutObject, s3:GetObject, s3:DeleteObject and s3:ListBucket"
        )


def _exported(body: bytes, directory: Path, key: str) -> tuple[Head, bytes]:
    """Return a HEAD and a snapshot for a database that `export` wrote. Raises ConfigError for any other file."""
    path = new_path(directory)
    path.write_bytes(body)
    connection = None
    try:
        connection = apsw.Connection(str(path))
        restore_copy_table(connection)
        seq = int(connection.execute("SELECT seq FROM copy JOIN state").get)
        epoch = blob_tables.epoch(connection)
        head = Head(store=uuid4().hex, nonce=os.urandom(8), seq=seq, fmt=format_of(connection), blob_epoch=epoch)
        connection.close()
        return head, path.read_bytes()
    except (apsw.Error, TypeError) as error:
        raise ConfigError(f"{key} is not a database that crudstack exported ({error}); move it away") from None
    finally:
        if connection is not None:
            connection.close()
        path.unlink(missing_ok=True)
