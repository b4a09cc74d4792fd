"""Changes of what is served: canary, promote, abort, rollback. Each is checked, locked, and written into the history.

What a server does about it is `flows.serving.releases.served_view`; nothing here copies or removes a version, so that
going back takes as long as going forward: the server loads what lies there already.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flows.serving.releases.state import Aliases, ReleaseError, check_proven, once_live, read_aliases, record, with_live
from flows.serving.repository import lock_repository, published_names


def canary(repository: Path, model_name: str, share: float, version: int | None = None, why: str = "") -> Aliases:
    """Lets a version answer a share of the requests in place of the live one; again with another share to widen it.

    Args:
        repository: Model repository.
        model_name: Published name.
        share: Above 0 and below 1.
        version: None = the candidate.
        why: For the history.

    Raises:
        ReleaseError: There is no such version, it is live, its files are not the proven ones, or another model's canary
            runs: the servers behind the proxy that answer the share serve all models.
    """
    if not 0 < share < 1:
        raise ReleaseError(f"share={share:g} must be above 0 and below 1. To serve all requests, promote the version.")
    with lock_repository(repository):
        before = read_aliases(repository, model_name)
        chosen = _chosen(model_name, version, before)
        others = [name for name in published_names(repository) if name != model_name]
        busy = [name for name in others if read_aliases(repository, name).share]
        if busy:
            raise ReleaseError(
                f"{busy[0]} is under canary with share {read_aliases(repository, busy[0]).share:g}, and one share "
                f"holds for all models. First: python -m flows.promote promote {busy[0]}, or abort {busy[0]}."
            )
        check_proven(repository, model_name, chosen)
        after = replace(before, candidate=chosen, share=share)
        record(repository, model_name, "canary", chosen, after, why=why)
        return after


def promote(repository: Path, model_name: str, version: int | None = None, why: str = "") -> Aliases:
    """Makes a version live, the candidate if none is named; the live one becomes `previous`.

    Raises:
        ReleaseError: There is no such version, it is live, or its files are not the proven ones.
    """
    with lock_repository(repository):
        before = read_aliases(repository, model_name)
        chosen = _chosen(model_name, version, before)
        check_proven(repository, model_name, chosen)
        after = with_live(before, chosen)
        record(repository, model_name, "promote", chosen, after, why=why)
        return after


def abort(repository: Path, model_name: str, why: str = "", who: str = "", version: int | None = None) -> Aliases:
    """Takes the candidate back; the live version answers all requests.

    Args:
        repository: Model repository.
        model_name: Published name.
        why: For the history.
        who: Empty = the user of this process.
        version: The candidate that is meant; None = whichever it is.

    Raises:
        ReleaseError: There is no candidate, or it is another one meanwhile.
    """
    with lock_repository(repository):
        before = read_aliases(repository, model_name)
        if before.candidate is None or version not in (None, before.candidate):
            raise ReleaseError(f"{model_name} has candidate {before.candidate}: there is nothing to abort.")
        after = replace(before, candidate=None, share=0.0)
        record(repository, model_name, "abort", before.candidate, after, why=why, who=who)
        return after


def rollback(repository: Path, model_name: str, version: int | None = None, why: str = "") -> Aliases:
    """Goes back to a version that was live, to the one before the live one if none is named; ends a canary.

    Raises:
        ReleaseError: There is none, or its files are not the proven ones.
    """
    with lock_repository(repository):
        before = read_aliases(repository, model_name)
        was_live = [one for one in once_live(repository, model_name) if one != before.live]
        chosen = before.previous if version is None else version
        if chosen is None or chosen not in was_live:
            wanted = "the one before the live one" if version is None else f"version {version}"
            raise ReleaseError(
                f"{model_name} cannot go back to {wanted}: versions that were live are {was_live or 'none'}. For "
                f"another one: python -m flows.promote promote {model_name} --version N."
            )
        check_proven(repository, model_name, chosen)
        earlier = was_live[was_live.index(chosen) + 1 :]
        after = Aliases(live=chosen, previous=earlier[0] if earlier else None)
        record(repository, model_name, "rollback", chosen, after, why=why)
        return after


def _chosen(model_name: str, version: int | None, before: Aliases) -> int:
    chosen = before.candidate if version is None else version
    if chosen is None:
        raise ReleaseError(
            f"{model_name} has no candidate. Name a version with --version N, or publish one with "
            "python -m flows.promote publish artifacts/runs/NAME."
        )
    if chosen == before.live:
        raise ReleaseError(f"version {chosen} of {model_name} is live already.")
    return chosen
