"""Sentences about imports that are not finished."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import ConfigError, CrudError, InvalidData
from ..resource_manager.contract.import_journal import ImportState
from .errors import ArchiveTooLarge, BadArchive, ImportConflict, ImportIncomplete, ImportTakenOver, ImportUnfinished
from .option_names import option_names

log = logging.getLogger("crudstack.import")

_NOTHING = re.compile(r"[;,] nothing was (?:changed|loaded|stored)(?:, try again|: .*)?|: start it again$")
"""What errors of stores say about the one step that failed, and advise if nothing was done before it."""
_UNCHANGED = (InvalidData, ConfigError, BadArchive, ArchiveTooLarge)
"""The errors of an import that say by their type that nothing was changed."""


class Extent(NamedTuple):
    """How much of an archive is imported: names of models.

    partly       models of which some resources may be imported
    unjournaled  models whose stores keep no journal, so that nothing is taken back
    """

    complete: Sequence[str]
    partly: Sequence[str]
    missing: Sequence[str]
    unjournaled: Sequence[str]


def _continue() -> str:
    names = option_names()
    return f"import that archive with {names.resume} to continue, or with {names.abort} to take it back"


def unfinished(name: str, state: ImportState) -> ImportUnfinished:
    """Return the error for a model that has the journal of an import."""
    return ImportUnfinished(
        f"an import of the archive with the SHA-256 {state.sha256} into the model {name!r} is not finished, and may"
        f" still be running: wait for its end or, if it was killed, {_continue()}"
    )


def unstorable(found: str) -> BadArchive:
    """Return the error for a resource that a storage cannot hold. `found`: which one, and why."""
    return BadArchive(
        f"{found}; nothing was changed: import into a storage of another kind, or only other models"
        f" ({option_names().model})"
    )


def incomplete(error: BaseException, extent: Extent) -> BaseException:
    """Return the error of an import that has changed something: it says how much is imported, and what to do."""
    if isinstance(error, ImportTakenOver):
        return error
    lists = {"imported": extent.complete, "imported in part": extent.partly, "not imported": extent.missing}
    told = "; ".join(f"{what}: {_listed(names)}" for what, names in lists.items() if names)
    outcome = f"{told}; {_advice(error, extent)}"
    if isinstance(error, _UNCHANGED):
        return ImportIncomplete(f"{_cause(error)}; {outcome}")
    if isinstance(error, CrudError):
        _tell(error, f"{_cause(error)}; {outcome}")
    else:
        log.warning("the import has stopped; %s", outcome)
    return error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _cause(error: CrudError) -> str:
    return error.cause if isinstance(error, ImportConflict) else _NOTHING.sub("", error.detail)


def _advice(error: BaseException, extent: Extent) -> str:
    names = option_names()
    if not extent.partly and not extent.missing:
        advice = f"import that archive with {names.resume} to complete it"
    elif isinstance(error, ImportConflict):
        advice = (
            f"continue with {names.resume} and {names.on_conflict}skip or replace, or take it back with {names.abort}"
        )
    else:
        advice = _continue()
    unjournaled = extent.unjournaled
    journaled = [name for name in (*extent.complete, *extent.partly, *extent.missing) if name not in unjournaled]
    if not unjournaled:
        return advice
    without = (
        f"the stores of {_listed(unjournaled)} keep no journal, so what is imported there stays: import that archive"
        f" with {names.on_conflict}skip to continue"
    )
    return f"{without}; for {_listed(journaled)} ({names.model}), {advice}" if journaled else without


def still_to_take_back(error: CrudError) -> CrudError:
    """Return the error of an import that could not be taken back completely. It says what to do."""
    if isinstance(error, ImportTakenOver):
        return error
    detail = (
        f"{_cause(error)}; the import is not taken back completely: import that archive with {option_names().abort}"
        " again"
    )
    if isinstance(error, _UNCHANGED):
        return ImportIncomplete(detail)
    _tell(error, detail)
    return error


def add_outcome(error: Exception, not_taken_back: int | None, failed: CrudError | None) -> None:
    """Add to the error of an import how it was taken back.

    not_taken_back  how many resources were left, because they were changed since
    failed          why it could not be taken back

    Raises ImportIncomplete in place of an error that says by its type that nothing was changed, if something is left.
    """
    if failed is not None:
        outcome = f"a part is imported, and could not be taken back ({_cause(failed)}): {_continue()}"
    else:
        outcome = "what was imported until then is taken back"
        outcome += f", except {not_taken_back} resources that were changed since" if not_taken_back else ""
    if failed is not None and isinstance(error, _UNCHANGED):
        raise ImportIncomplete(f"{_cause(error)}; {outcome}") from error
    if isinstance(error, CrudError):
        _tell(error, f"{_NOTHING.sub('', error.detail)}; {outcome}")
    else:
        log.error("an import failed; %s", outcome)


def _tell(error: CrudError, detail: str) -> None:
    error.detail, error.args = detail, (detail,)
