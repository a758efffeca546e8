"""Error messages for failed hub downloads: the cause in one sentence, with a fix."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from urllib.parse import urlsplit

from rayrlhf.hub.access import Access
from rayrlhf.hub.ids import HubId

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}\b")


class HubError(ValueError):
    """A model or data set cannot be fetched from the hub; the message has what was requested and the fix."""


def explained(error: BaseException, hub_id: HubId, access: Access, cache: Path) -> HubError:
    """A `HubError` for what huggingface_hub raised, with the fix. Its own text may contain addresses with
    passwords: of an unknown error, only the type and the first line without secrets are quoted.
    """
    known = recognised(error, hub_id, access, cache)
    if known is not None:
        return known
    return HubError(
        f"{_named(hub_id)}: {host_of(access.endpoint)} cannot be reached ({type(error).__name__}: "
        f"{_first_line(error)}), and the cache {cache} is incomplete. Fix: check the network and "
        "HF_ENDPOINT, or download on another machine and copy the cache here"
    )


def recognised(error: BaseException, hub_id: HubId, access: Access, cache: Path) -> HubError | None:
    """`explained` for a known cause, also where another error was raised from it; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, HubError):
            return cause
        text = _known(cause, hub_id, access, cache)
        if text is not None:
            return HubError(f"{_named(hub_id)}{text}")
        cause = cause.__cause__ or cause.__context__
    return None


def _known(error: BaseException, hub_id: HubId, access: Access, cache: Path) -> str | None:
    from huggingface_hub import errors

    hub = host_of(access.endpoint)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return (
            f" is gated at {hub}, and {_token(access)} has no access. Fix: request access on its page, then "
            "set a token of that account in HF_TOKEN or with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f": {hub} has {hub_id.repo}, but no revision {hub_id.revision}. Fix: put one of its branches, "
            "tags or commits after the '@', or leave it out for the default branch"
        )
    if status in (401, 403) and "credentials" in str(error).lower():
        return (
            f": {hub} refuses the token of this machine as invalid. Fix: set a valid one in HF_TOKEN or "
            "with `hf auth login`, or none for public repositories"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f": {hub} has none of that name that {_token(access)} may see. Fix: check the name; "
            "for a private one set a token of an account with access in HF_TOKEN or with `hf auth login`"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f": the disk of {cache} is full. Fix: free space, or set HF_HOME to another disk"
    if isinstance(error, PermissionError):
        return f": {cache} cannot be written ({error.strerror}). Fix: set HF_HOME to a writable folder"
    if status is not None:
        return f": {hub} answered {status}. Fix: try again later, or check HF_ENDPOINT and the token"
    if access.offline or isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f" is not completely in the cache {cache}, and HF_HUB_OFFLINE is set. Fix: unset it, or "
            f"download on a machine with a network: hf download {hub_id.repo}"
            + (" --repo-type dataset" if hub_id.kind == "dataset" else "")
        )
    return None


def _named(hub_id: HubId) -> str:
    return f"the {'data set' if hub_id.kind == 'dataset' else 'model'} {hub_id}"


def _token(access: Access) -> str:
    return "a request without a token" if access.token is None else "the token of this machine"


def host_of(endpoint: str | None) -> str:
    """The host of an endpoint, without the user and password that the address may contain."""
    if endpoint is None:
        return "the hub"
    parts = urlsplit(endpoint)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return SECRET.sub("hf_…", re.sub(r"//[^/@\s]*@", "//…@", line))[:200]
