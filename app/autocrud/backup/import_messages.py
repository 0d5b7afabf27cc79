"""Sentences about imports that are not finished."""

from __future__ import annotations

import logging

from ..errors import CrudError
from ..resource_manager.contract.import_journal import ImportState
from .errors import ImportConflict, ImportUnfinished
from .option_names import option_names

log = logging.getLogger("crudstack.import")


def _continue() -> str:
    names = option_names()
    return f"import that archive with {names.resume} to continue, or with {names.abort} to take it back"


def unfinished(name: str, state: ImportState) -> ImportUnfinished:
    """Return the error for a model that has the journal of an import."""
    return ImportUnfinished(
        f"an import of the archive with the SHA-256 {state.sha256} into the model {name!r} is not finished, and may"
        f" still be running: wait for its end or, if it was killed, {_continue()}"
    )


def advise_to_continue(error: ImportConflict) -> None:
    """Replace the advice of a conflict, because a part of the archive is imported."""
    names = option_names()
    advice = (
        f"a part of the archive is imported already; continue with {names.resume} and {names.on_conflict}skip or"
        f" replace, or take it back with {names.abort}"
    )
    _tell(error, f"{error.cause}: {advice}")


def add_outcome(error: Exception, not_taken_back: int | None, failed: CrudError | None) -> None:
    """Add to the error of an import how it was taken back.

    not_taken_back  how many resources were left, because they were changed since
    failed          why it could not be taken back
    """
    if failed is not None:
        outcome = f"a part is imported, and could not be taken back ({failed.detail}): {_continue()}"
    else:
        outcome = "what was imported until then is taken back"
        outcome += f", except {not_taken_back} resources that were changed since" if not_taken_back else ""
    if isinstance(error, CrudError):
        _tell(error, f"{error.detail}; {outcome}")
    else:
        log.error("an import failed; %s", outcome)


def _tell(error: CrudError, detail: str) -> None:
    error.detail, error.args = detail, (detail,)
