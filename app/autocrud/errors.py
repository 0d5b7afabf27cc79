"""The errors of the engine.

Every error that a caller may get is a `CrudError`. Its `type` is stable; the HTTP API sends it as the `type` of the
problem, and `status` as the HTTP status. The message says what was found, what was expected and what to do. Clients see
it, so it never holds a secret, a path of the machine or a traceback.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple


class Violation(NamedTuple):
    """One invalid part of a request.

    `pointer` is a JSON Pointer (RFC 6901) into the body, or `?name` for a parameter of the query string.
    """

    pointer: str
    detail: str


class CrudError(Exception):
    """The base of all errors that the engine raises on purpose.

    `operation` is the index of the failed operation in a batch, or None.
    """

    type: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, violations: tuple[Violation, ...] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.violations = violations
        self.operation: int | None = None


class InvalidData(CrudError, ValueError):
    """A body, a patch or an id is invalid for the model."""

    type, title, status = "invalid-data", "The data does not fit the model", 422


class InvalidQuery(CrudError, ValueError):
    """A filter, a sort key, a limit or a cursor is invalid."""

    type, title, status = "invalid-query", "The query cannot be answered", 400


class ResourceNotFound(CrudError, LookupError):
    """No resource has this id."""

    type, title, status = "not-found", "Not found", 404


class RevisionNotFound(CrudError, LookupError):
    """The resource has no revision with this number, or retention removed it."""

    type, title, status = "revision-not-found", "No such revision", 404


class ResourceDeleted(CrudError):
    """The resource is deleted. It can be restored or purged, and read with `include_deleted`."""

    type, title, status = "deleted", "The resource is deleted", 410


class VersionConflict(CrudError):
    """The resource is not in the state that the change expected. Nothing was changed."""

    type, title, status = "version-conflict", "The resource has changed", 412


class WriteContention(CrudError):
    """Other writers kept changing the resource during a write without an expected state.

    Nothing was changed.
    """

    type, title, status = "write-contention", "Too many writers at once", 409


class UniqueConflict(CrudError):
    """Another resource, which may be a deleted one, has the same value in a unique field. Nothing was changed.

    `field` is the name of the field.
    """

    type, title, status = "unique-conflict", "The value is taken", 409
    field = ""
    """The name of the field."""
    resource_ids: frozenset[str] = frozenset()
    """The ids of the resources that would share the value. Empty if the store does not know them."""


class RevisionIsStable(CrudError):
    """The current revision is stable, so `modify` was refused: a stable revision never changes."""

    type, title, status = "revision-is-stable", "A stable revision never changes", 409


class PatchConflict(CrudError):
    """A `test` of a JSON Patch failed, or a pointer names a location that the document does not have."""

    type, title, status = "patch-conflict", "The patch does not apply", 409


class KeyReused(CrudError, ValueError):
    """The Idempotency-Key was used for a different request before. Nothing was changed."""

    type, title, status = "idempotency-key-reused", "The key belongs to another request", 422


class KeyInFlight(CrudError):
    """The first request with this Idempotency-Key is still running."""

    type, title, status = "idempotency-key-in-flight", "The first request is still under way", 409


class AnswerGone(CrudError):
    """The request with this Idempotency-Key was done before, but its response cannot be repeated.

    The result of that request was replaced or purged since.
    """

    type, title, status = "answer-gone", "This was done, and its result is gone", 410


class StaleGeneration(CrudError):
    """A body was written under a generation that is being swept.

    The storage writes the body again, so callers never get this error.
    """

    type, title, status = "stale-generation", "Written under a swept generation", 503


class StoreUnavailable(CrudError):
    """The store cannot do this now. Nothing was changed, and the request can be repeated."""

    type, title, status = "store-unavailable", "The store is unavailable", 503


class Overloaded(CrudError):
    """The server has more work than it can do in time. This request was not started, and can be repeated."""

    type, title, status = "overloaded", "The server has too much to do", 503


class NotEnoughTime(CrudError):
    """The time of the request might end before this work is done, so the work was not started.

    Nothing was changed. If `may_fit` is true, the full time of a request is enough, so a repeated request can succeed.
    """

    type, title, status = "not-enough-time", "There is not enough time left", 503
    may_fit = False


class OutcomeUnknown(CrudError):
    """The store cannot tell whether the write happened. Read the resource before you repeat the write."""

    type, title, status = "outcome-unknown", "The outcome is unknown", 503


class StoreDamaged(CrudError):
    """Stored data cannot be read. Repeating the request does not help; the store must be repaired.

    `resource_id` is the resource whose data is damaged. It is None if the resource is not known, or if the whole store
    is damaged.
    """

    type, title, status = "store-damaged", "Stored data cannot be read", 503
    resource_id: str | None = None


class ConfigError(CrudError, ValueError):
    """A model, an index or a setting of the program is wrong. Raised at start, not by requests."""

    type, title, status = "misconfigured", "The service is misconfigured", 500


class DataTooLarge(CrudError):
    """The data that a patch would produce is larger than a body may be."""

    type, title, status = "data-too-large", "The data would be too large", 413


class MetadataTooLarge(CrudError):
    """The indexed fields of a resource, or the items of an indexed list, would exceed what a store accepts.

    Nothing was changed.
    """

    type, title, status = "metadata-too-large", "The metadata and indexed fields are too large", 413


class BlobGone(CrudError):
    """The data refer to a blob that does not exist, or that the caller may not use. Nothing was changed."""

    type, title, status = "blob-gone", "There is no such blob", 422


class BlobNotFound(CrudError, LookupError):
    """The resource has no reference to a blob with this SHA-256, in the revision that was asked for."""

    type, title, status = "blob-not-found", "The resource has no such file", 404


class DigestMismatch(CrudError, ValueError):
    """The content of an upload does not have the SHA-256 that was announced. Nothing was stored."""

    type, title, status = "digest-mismatch", "The content has another SHA-256", 422


class BlobTooLarge(CrudError):
    """An upload is larger than a blob may be. Nothing was stored."""

    type, title, status = "blob-too-large", "The file is too large", 413


class BlobQuotaExceeded(CrudError):
    """With this upload, the blobs of the model would take more bytes than its quota. Nothing was stored."""

    type, title, status = "blob-quota-exceeded", "The model has no room for this file", 413


class ModelNotEmpty(CrudError):
    """The model has data, so nothing was loaded into it."""

    type, title, status = "model-not-empty", "The model has data", 409


class LoadTooLarge(CrudError):
    """The store cannot load so much in one step. Nothing was changed."""

    type, title, status = "load-too-large", "Too much for one step", 413


class TooManyUploads(CrudError):
    """The caller has begun too many uploads that are not complete. Nothing was changed."""

    type, title, status = "too-many-uploads", "Too many uploads at once", 429


class UploadNotFound(CrudError, LookupError):
    """The caller has no upload with this id, or it has expired."""

    type, title, status = "upload-not-found", "There is no such upload", 404


class UploadIncomplete(CrudError):
    """An upload was to be completed before its content was sent."""

    type, title, status = "upload-incomplete", "The upload is not complete", 409


class PinLost(CrudError):
    """An export or import was interrupted for so long that the store no longer keeps what it needs.

    It must be started again.
    """

    type, title, status = "pin-lost", "The store went on without waiting", 503


class HeadLost(StoreDamaged):
    """The data in the bucket is missing, or older than what this process read: it was removed or replaced."""

    type, title, status = "head-lost", "The store in the bucket was removed or replaced", 503


class ConditionalWritesUnsupported(ConfigError):
    """The object storage ignores If-Match or If-None-Match, so writers would overwrite each other."""

    type, title, status = "conditional-writes-unsupported", "The object storage ignores conditions", 500


class HistoryForked(CrudError):
    """The history in the bucket contradicts what this process read: the object storage lost acknowledged writes.

    The model stops in this process, because each later answer could contradict an earlier one.
    """

    type, title, status = "history-forked", "The object storage lost acknowledged writes", 503
