"""The errors of exports and imports. Each message is one sentence that an operator can act on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import CrudError


class BadArchive(CrudError, ValueError):
    """The archive is truncated, damaged, hostile, or of a format that this program does not know.

    Nothing was changed.
    """

    type, title, status = "bad-archive", "The archive cannot be used", 422


class ArchiveTooLarge(CrudError):
    """The archive, or a part of it, is larger than the limits allow. Nothing was changed."""

    type, title, status = "archive-too-large", "The archive is too large", 413


class ImportConflict(CrudError):
    """Ids or unique values of the archive exist already. Nothing was changed, unless the message says how much was.

    cause   the first part of the message: what was found
    advice  the second part, which is only in the message: what to do
    ids     some ids of the archive that the model has already
    fields  how many resources of the archive have a unique value that another resource has, by field
    """

    type, title, status = "import-conflict", "The model has such resources already", 409

    def __init__(
        self, cause: str, advice: str, *, ids: Sequence[str] = (), fields: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(f"{cause}: {advice}")
        self.cause, self.ids, self.fields = cause, tuple(ids), dict(fields or {})


class ImportUnfinished(CrudError):
    """The model has the journal of an import that is not finished. Resume or abort it first."""

    type, title, status = "import-unfinished", "Another import is not finished", 409


class ImportIncomplete(CrudError):
    """An import failed after it had changed something. The message says what is imported, and what to do.

    It replaces the errors that say by their type that nothing was changed. Its cause is that error.
    """

    type, title, status = "import-incomplete", "A part of the archive is imported", 500


class NoSuchImport(CrudError, LookupError):
    """There is no interrupted import of this archive to resume or abort."""

    type, title, status = "no-such-import", "There is no such import", 404


class ImportTakenOver(CrudError):
    """Another command has resumed or aborted this import while it ran, so it has stopped.

    aborted  whether the import was aborted
    """

    type, title, status = "import-taken-over", "Another command has taken over this import", 409
    aborted = False
