"""The part of S3SqliteMetaStore for imports: the entries of a journal.

HEAD has the state of the import, so that it is decided like a commit. The other entries are objects below
`{key}/import/`. Programs that do not know imports keep the state as it is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from typing_extensions import override

from ..backends.s3_sqlite.committer import HeadEdit
from ..backends.s3_sqlite.head import Head
from ..backends.s3_sqlite.replica import Replica
from ..contract.import_journal import STATE, ImportKeeping

FOLDER = "import/"


class S3ImportKeeping(ImportKeeping):
    """The entries of a journal in HEAD and beside it."""

    _replica: Replica

    @abstractmethod
    async def _edit(self, edit: HeadEdit) -> Head | None:
        """Replace HEAD by what `edit` returns, and return the new one; None if it returned None."""

    def _object(self, name: str) -> str:
        return f"{self._replica.prefix}{FOLDER}{name}"

    @override
    async def import_entry(self, name: str) -> bytes | None:
        if name == STATE:
            await self._replica.open()
            await self._replica.coalesced_check()
            return (await self._replica.head()).importing or None
        found = await self._replica.objects.get(self._object(name))
        return None if found is None else found.body

    @override
    async def put_import_entry(self, name: str, value: bytes, *, replaces: bytes | None) -> bool:
        present = await self.import_entry(name)  # as new as HEAD
        if name != STATE:
            if present == replaces:
                await self._replica.objects.put(self._object(name), value)
            return present == replaces
        if present == replaces:
            await self._edit(lambda head: head.next(importing=value) if (head.importing or None) == replaces else None)
        # A swap whose reply was lost is found here: no other process stores the same bytes.
        return (await self._replica.head()).importing == value

    @override
    async def import_entries(self, prefix: str, after: str, limit: int) -> list[str]:
        names: list[str] = []
        if prefix == "" and not after and await self.import_entry(STATE) is not None:
            names.append(STATE)
        folder = self._object("")
        async for listed in self._replica.objects.list(folder + prefix, folder + after if after else ""):
            names.append(listed.key.removeprefix(folder))
            if len(names) >= limit:
                break
        return sorted(names)

    @override
    async def remove_import_entries(self, names: Sequence[str]) -> None:
        if objects := [self._object(name) for name in names if name != STATE]:
            await self._replica.objects.delete(objects)
        if STATE in names:
            await self._edit(lambda head: head.next(importing=b"") if head.importing else None)
