"""Create a store in the bucket, once, and check that the storage honours conditions.

Invariant: HEAD and BORN are created, never re-created. If a copy has seen a HEAD, or if BORN exists without a HEAD, then
HEAD was removed. A new HEAD would let writers that slept through that be acknowledged into another history. A BORN that
somebody removed is written again with the id of the HEAD that was read: if that HEAD is replaced meanwhile, the new one
is refused, because BORN names another store.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from uuid import uuid4

import apsw

from ....errors import ConditionalWritesUnsupported, ConfigError, HeadLost, StoreUnavailable
from ...records import Findings
from ..s3.object_store import Object, ObjectStore, Outcome, Stored, Unknown
from .head import Head, Snapshot, snapshot_key
from .local_copy import new_path

log = logging.getLogger("crudstack.s3sqlite")


class StoreCreation:
    """The creation of the store at `key`, as one process takes part in it."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self._objects, self._key, self._prefix = objects, key, f"{key}/"
        self._head_key, self._born_key = f"{key}/HEAD", f"{key}/BORN"
        self._confirmed = ""  # the store that BORN is known to name

    async def create(self, directory: Path, known: str) -> None:
        """Create HEAD, unless another process did. `known`: the id of the store that this process knows, or "".

        `directory` is for temporary files. Raises HeadLost if the store was created before. The outcome of the PUT does not matter: the
        caller reads HEAD next.
        """
        lost = HeadLost(
            f"{self._head_key} is missing, although the store was in use: somebody removed it; put it back, or remove all"
        )
        if known:
            raise lost
        if await self._objects.get(self._born_key) is not None:
            # HEAD is there before BORN, so only now its absence means something.
            if await self._objects.get(self._head_key) is None:
                raise lost
            return
        head = await self._imported(directory)
        if head is None:
            head = Head(store=uuid4().hex, nonce=os.urandom(8), findings=Findings(healed=True))
        outcome = await self._objects.put_if(self._head_key, head.encode(), None)
        if isinstance(outcome, Unknown):
            _check_may_write(outcome)  # whatever else came of it: HEAD is read next

    async def _imported(self, directory: Path) -> Head | None:
        """Return a HEAD that begins with the plain database at `key`, if there is one."""
        plain = await self._objects.get(self._key)
        if plain is None:
            return None
        seq = await asyncio.get_running_loop().run_in_executor(
            None, lambda: _exported_seq(plain.body, directory, self._key)
        )
        key = snapshot_key(self._prefix, 1, seq)
        await self._objects.put(key, plain.body)
        snapshot = Snapshot(key, seq, len(plain.body), hashlib.sha256(plain.body).hexdigest())
        return Head(store=uuid4().hex, nonce=os.urandom(8), seq=seq, snap=snapshot, imported=plain.etag)

    async def confirm(self, head: Head) -> None:
        """Write the id of the store to BORN, unless that is done. Called before a HEAD is read from or replaced.

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
                raise HeadLost(f"{self._born_key} names another store than {self._head_key}: somebody removed a HEAD")
        self._confirmed = head.store

    async def probe(self, store: str) -> None:
        """Check that conditions are honoured. A storage that ignores them overwrites BORN with what it holds already."""
        outcomes = await self._probed(store.encode())
        if isinstance(outcomes[0], Stored):  # BORN was missing, and is there now; or the condition was ignored
            outcomes = await self._probed(store.encode())
            if not isinstance(outcomes[0], Stored):
                log.warning(
                    "%s was missing and is written again; did somebody remove objects of the store?", self._born_key
                )
        for condition, outcome in zip(("If-None-Match", "If-Match"), outcomes, strict=True):
            if isinstance(outcome, Stored):
                raise ConditionalWritesUnsupported(
                    f"the object storage ignores {condition}, so writers would overwrite each other; use one that honours it (S3 does)"
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

    async def refuse_old_writers(self, head: Head) -> None:
        """Raise ConfigError if the plain database that was imported has changed since."""
        if head.imported is not None:
            found = await self._objects.get_if_changed(self._key, head.imported)
            if isinstance(found, Object):
                raise ConfigError(
                    f"{self._key} has changed since it was imported: an earlier deployment still writes to it; stop it, and remove that object"
                )


def _check_may_write(outcome: Unknown) -> None:
    """Raise ConfigError if the answer to a PUT was that this key may not write."""
    if outcome.reason.startswith("403 ") and outcome.reason.endswith("AccessDenied"):  # not: an expired token
        raise ConfigError(
            f"the AWS credentials may read but not write: the object storage answered {outcome.reason} to a PUT; allow s3:PutObject,"
            " s3:GetObject, s3:DeleteObject and s3:ListBucket"
        )


def _exported_seq(body: bytes, directory: Path, key: str) -> int:
    """Return the seq of a database that `export` wrote. Raises ConfigError for any other file."""
    path = new_path(directory)
    path.write_bytes(body)
    connection = None
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        return int(connection.execute("SELECT seq FROM copy JOIN state").get)
    except (apsw.Error, TypeError) as error:
        raise ConfigError(f"{key} is no database that crudstack exported ({error}); move it away") from None
    finally:
        if connection is not None:
            connection.close()
        path.unlink(missing_ok=True)
