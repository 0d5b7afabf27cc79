"""The results of a commit that may be stored with its Idempotency-Key."""

from __future__ import annotations

from collections.abc import Sequence

from ..basic import IdempotentCommit, ResourceMeta


def results_to_keep(once: IdempotentCommit, changed: Sequence[tuple[str, bool]]) -> list[int | ResourceMeta | None]:
    """Return the results of `once`, with None for each resource that the same commit purges.

    A store calls this in `commit`, and replaces each number by the metadata of the change at this position. If a later
    commit purges a resource, the store replaces all stored results of this resource by None.

    changed  for each change of the commit, the id of its resource and whether the change is a purge
    """
    purges = {resource_id: number for number, (resource_id, purge) in enumerate(changed) if purge}
    kept: list[int | ResourceMeta | None] = []
    for result in once.results:
        if isinstance(result, int):
            resource_id, _ = changed[result]
            purged = result <= purges.get(resource_id, -1)  # a change after the purge made the resource again
        else:  # the metadata before the commit, because the operation changed nothing
            purged = result is not None and result.resource_id in purges
        kept.append(None if purged else result)
    return kept
