"""Planted defects in packs and their sweep, which `test_pack_simulation` must find; `mutants` runs them.

Each is a name, a file, a text in it, the text that replaces it, and the tests that must fail then.
"""

from __future__ import annotations

from .mutants_of_stores import M

SIMULATION = ["tests/stores/test_pack_simulation.py"]
PACKS = M + "resource_store/packs.py"
SWEEP = M + "storage/sweeping.py"

PACK_MUTANTS = [
    (
        "a sweep of packs uses only the second look",
        SWEEP,
        "sorted({*before[name], *uids})",
        "uids",
        ["tests/stores/test_packs.py"],
    ),
    (
        "a sweep of packs looks only once",
        SWEEP,
        "after = await self._references.packs_with_orphans([pack for pack in packs if pack.name in before])",
        "after = before",
        ["tests/stores/test_packs.py"],
    ),
    (
        "a sweep of packs ignores pins",
        SWEEP,
        "if self._pins is not None and await self._pins.has_pins():\n                return False",
        "if False:\n                return False",
        SIMULATION,
    ),
    (
        "a pack is written without a condition",
        PACKS,
        "await self._objects.put_if(key, edited, found.etag)",
        "await self._objects.put_if(key, edited, getattr(await self._objects.get(key), 'etag', None))",
        SIMULATION,
    ),
    (
        "a pack is deleted with the last but one body",
        PACKS,
        "if not left and not any(content):",
        "if left <= 1:",
        SIMULATION,
    ),
    (
        "all batches of an import share a pack",
        PACKS,
        'end_batch(self) -> None:\n        self._pack = ""',
        "end_batch(self) -> None:\n        pass",
        SIMULATION,
    ),
    ("the length of a pack stays", PACKS, "bytes(0 if damaged else left)", "bytes(count)", SIMULATION),
    ("a body that was removed counts again", PACKS, 'count -= body[:1] not in (b"", b"\\0")', "count -= 1", SIMULATION),
    ("zero bytes are read as a body", PACKS, 'body[:1] == b"\\0" or len(body) <', "len(body) <", SIMULATION),
    ("a sweep of a pack keeps all bytes", PACKS, "            content[:] = bytes(len(content))\n", "", SIMULATION),
    (
        "a removal leaves all but the first byte",
        PACKS,
        "content[place.start : place.end] = bytes(len(body))",
        "content[place.start] = 0",
        SIMULATION,
    ),
    (
        "only packs without any reference are swept",
        M + "backends/sqlite/packs.py",
        "if len(rows) < max(1, pack.bodies):",
        "if not rows:",
        SIMULATION,
    ),
    (
        "a purge leaves bodies in packs",
        M + "resource_store/s3.py",
        "packs = places_by_pack(uids)",
        "packs = places_by_pack(())",
        SIMULATION,
    ),
    (
        "packs have a generation that no sweep reaches",
        M + "storage/imports.py",
        "self.resource_store.uid_allotment(self._sweep.new_uid)",
        "self.resource_store.uid_allotment(lambda: f'999{self._sweep.new_uid()}')",
        SIMULATION,
    ),
    (
        "an import discards bodies while its outcome is unknown",
        "app/autocrud/backup/importing.py",
        "discarded = False\n                try:",
        "try:",
        SIMULATION,
    ),
]
