"""What can go wrong, in the words of the engine.

Every error that a caller may meet is a `CrudError`; its `type` is stable and is what the HTTP API answers as the
problem's `type`, its `status` the HTTP status. The message says what was found, what was expected and what to do. It is shown to
clients, so it never holds a secret, a path or a traceback.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple


class Violation(NamedTuple):
    """One thing that is wrong in a request.

    `pointer` is a JSON Pointer (RFC 6901) into the body, or `?name` for a parameter of the query string.
    """

    pointer: str
    detail: str


class CrudError(Exception):
    """Base of everything that the engine raises on purpose."""

    type: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, violations: tuple[Violation, ...] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.violations = violations
        self.operation: int | None = None  # which one of a batch it was


class InvalidData(CrudError, ValueError):
    """A body, a patch or an id that does not fit the model."""

    type, title, status = "invalid-data", "The data does not fit the model", 422


class InvalidQuery(CrudError, ValueError):
    """A filter, a sort key, a limit or a cursor that means nothing here."""

    type, title, status = "invalid-query", "The query cannot be answered", 400


class ResourceNotFound(CrudError, LookupError):
    """No resource has this id."""

    type, title, status = "not-found", "Not found", 404


class RevisionNotFound(CrudError, LookupError):
    """The resource has no revision of this number, or retention removed it."""

    type, title, status = "revision-not-found", "No such revision", 404


class ResourceDeleted(CrudError):
    """The resource is deleted: it can be restored or purged, and read where the caller asks for deleted ones."""

    type, title, status = "deleted", "The resource is deleted", 410


class VersionConflict(CrudError):
    """The resource is not in the state that the change expected; nothing was changed."""

    type, title, status = "version-conflict", "The resource has changed", 412


class WriteContention(CrudError):
    """Other writers kept changing the resource while a write without an expectation was tried; nothing was changed."""

    type, title, status = "write-contention", "Too many writers at once", 409


class UniqueConflict(CrudError):
    """Another resource, possibly a deleted one, holds a value that must be unique; nothing was changed."""

    type, title, status = "unique-conflict", "The value is taken", 409
    field = ""
    """The name of the field."""
    resource_ids: frozenset[str] = frozenset()
    """The ids of the resources that would share the value. Empty if the store does not know them."""


class RevisionIsStable(CrudError):
    """`modify` was asked of a revision that is stable, and a stable revision never changes."""

    type, title, status = "revision-is-stable", "A stable revision never changes", 409


class PatchConflict(CrudError):
    """A `test` of a JSON Patch failed, or it names a place that the document does not have."""

    type, title, status = "patch-conflict", "The patch does not apply", 409


class KeyReused(CrudError, ValueError):
    """The Idempotency-Key belongs to another request; nothing was changed."""

    type, title, status = "idempotency-key-reused", "The key belongs to another request", 422


class KeyInFlight(CrudError):
    """The first request with this Idempotency-Key is not answered yet."""

    type, title, status = "idempotency-key-in-flight", "The first request is still under way", 409


class AnswerGone(CrudError):
    """The request with this Idempotency-Key was done, but what it left has been replaced or purged, so its answer cannot be told again."""

    type, title, status = "answer-gone", "This was done, and its result is gone", 410


class StaleGeneration(CrudError):
    """A body was written under a generation that is already being swept; the storage writes it again, callers never see this."""

    type, title, status = "stale-generation", "Written under a swept generation", 503


class StoreUnavailable(CrudError):
    """The store could not do it now and certainly did not do it; try again."""

    type, title, status = "store-unavailable", "The store is unavailable", 503


class Overloaded(CrudError):
    """There is more to do than could be done in time; this was not begun. Try again."""

    type, title, status = "overloaded", "The server has too much to do", 503


class NotEnoughTime(CrudError):
    """The request's time might end before this is done, so it was not begun; nothing was changed."""

    type, title, status = "not-enough-time", "There is not enough time left", 503
    may_fit = False
    """Whether the whole time of a request would do, so that it helps to try again."""


class OutcomeUnknown(CrudError):
    """The store cannot say whether the write happened; read before trying again."""

    type, title, status = "outcome-unknown", "The outcome is unknown", 503


class StoreDamaged(CrudError):
    """Something that was stored cannot be read back. Repeating the request does not help, repairing the store does."""

    type, title, status = "store-damaged", "Stored data cannot be read", 503
    resource_id: str | None = None
    """The resource whose data is damaged; None if it is not known, or if the whole store is damaged."""


class ConfigError(CrudError, ValueError):
    """The program was put together wrongly: a model, an index or a setting. Raised at start, not by requests."""

    type, title, status = "misconfigured", "The service is misconfigured", 500


class DataTooLarge(CrudError):
    """What a patch would make of the data is larger than any body may be."""

    type, title, status = "data-too-large", "The data would be too large", 413


class MetadataTooLarge(CrudError):
    """The indexed fields of a resource, or the items of an indexed list, would become more than a store takes; nothing was changed."""

    type, title, status = "metadata-too-large", "The metadata and indexed fields are too large", 413


class HeadLost(StoreDamaged):
    """What is in the bucket is not, or is older than, what was there before: somebody removed or replaced it."""

    type, title, status = "head-lost", "The store in the bucket was removed or replaced", 503


class ConditionalWritesUnsupported(ConfigError):
    """The object storage ignores If-Match or If-None-Match, without which writers would overwrite each other."""

    type, title, status = "conditional-writes-unsupported", "The object storage ignores conditions", 500


class HistoryForked(CrudError):
    """The history in the bucket does not continue what this process knows: the object storage lost acknowledged writes.

    The model stops in this process, because every later answer could contradict an earlier one.
    """

    type, title, status = "history-forked", "The object storage lost acknowledged writes", 503
