"""Keep the code of a function if it runs the contents of the new zip already.

Pulumi compares zips by the hash of their bytes. Another zlib compresses the same files to other bytes, and another
patch release of Python compiles the same modules to other bytecode. So two machines would deploy unchanged code in
turn. Therefore each function records the hash of the contents, `artifact.contents`, as its `source_code_hash`. AWS's
provider stores this hash and does not use it. If the state says that a function has these contents, its `code` is
ignored.

Invariant: `running` names a function only if an update that uploaded these contents has succeeded. The state gets the
inputs of a resource at the end of its update. If inputs and outputs differ, if the provider reported errors, or if an
operation was interrupted, the update may not have ended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from infra.artifact import Artifact

PROGRAM = Path(__file__).resolve().parent
"""The directory of the program. The engine and the provider resolve relative paths from it."""
FUNCTION = "aws:lambda/function:Function"


class Package(NamedTuple):
    """The zip of a stack's functions."""

    path: str
    """Relative to the program, so that a later update finds the zip of another machine's state in its own checkout."""
    contents: str | None = None
    """The hash of the contents; None if it is not known: then functions are updated if the bytes of the zip differ."""
    running: frozenset[str] = frozenset()
    """The functions that have these contents already, by their names in the program."""

    def ignored(self, name: str) -> list[str] | None:
        """Return the arguments that Pulumi must not compare for the function of this name."""
        return ["code"] if name in self.running else None


def package_of(artifact: Artifact, state: Any) -> Package:
    """Return the package of a built zip.

    state    the exported state of the stack, or None if it is not known
    """
    path = Path(os.path.relpath(artifact.path.resolve(), PROGRAM)).as_posix()
    if not artifact.contents:
        return Package(path)
    return Package(path, artifact.contents, running(state, artifact.contents))


def running(state: Any, contents: str) -> frozenset[str]:
    """Return the names of the functions that have these contents and whose recorded zip exists on this machine.

    The provider reads the recorded zip at each update of a function, also if only other arguments change.
    """
    deployment = (state or {}).get("deployment") or {}
    interrupted = {each["resource"]["urn"] for each in deployment.get("pending_operations") or []}
    names = set()
    for each in deployment.get("resources") or []:
        if each["type"] != FUNCTION or each.get("delete") or each.get("initErrors") or each["urn"] in interrupted:
            continue
        given, made = each.get("inputs") or {}, each.get("outputs") or {}
        code, uploaded = given.get("code") or {}, made.get("code") or {}
        if (
            given.get("sourceCodeHash") == made.get("sourceCodeHash") == contents
            and code.get("hash") is not None
            and code.get("hash") == uploaded.get("hash")
            and isinstance(code.get("path"), str)
            and (PROGRAM / code["path"]).is_file()
        ):
            names.add(each["urn"].rpartition("::")[2])
    return frozenset(names)
