"""Exports on their way to the Hugging Face hub: what can be known before, and the upload."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.errors import CheckpointError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubTarget(NamedTuple):
    """Where an export is pushed to.

    Attributes:
      repository: a model on the hub, `OWNER/NAME`; made if there is none.
      private: whether it is to be seen by its owner alone.
      revision: the branch, made from the main one if there is none; None is the main one.
      commit_message: None leaves it to `push_folder`.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None


def require_access(target: HubTarget) -> None:
    """Finds what would keep an export from being pushed, and changes nothing on the hub.

    Raises:
      CheckpointError: the name is none of a repository, nobody is logged in, the token may not
        write there, the repository is public and is to be private, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    name = target.repository
    try:
        if not _REPOSITORY.fullmatch(name):
            raise HFValidationError
        validate_repo_id(name)
    except HFValidationError:
        raise CheckpointError(
            f"push to hub: {name!r} is no name of a repository; give OWNER/NAME, of letters, "
            "digits, '-', '_' and '.'"
        ) from None
    api = HfApi()
    with _hub_errors(f"push to hub: {name}"):
        me = api.whoami()
        _require_writing(name, me)
        try:
            found = api.model_info(name)
        except RepositoryNotFoundError:
            return
    if target.private and not found.private:
        raise CheckpointError(
            f"push to hub: {name} is there already and public; make it private on its page, or "
            "give another name"
        )


def push_folder(folder: Path, target: HubTarget) -> str:
    """Uploads all of a folder, and returns where it can be seen.

    Files of the same name are replaced, others stay.

    Args:
      folder: a finished export.
      target: which passed `require_access`.

    Raises:
      CheckpointError: the hub did not take it; the message says that `folder` is complete, and how
        to push it by hand.
    """
    from huggingface_hub import HfApi

    api, name, branch = HfApi(), target.repository, target.revision
    again = ["hf upload", name, str(folder), "."]
    again += ["--private"] * target.private + [f"--revision {branch}"] * (branch is not None)
    what = f"{folder} is complete and stays, but pushing it to {name} failed"
    with _hub_errors(what, f"; push it with `{' '.join(again)}`"):
        # Of a repository that exists, the visibility stays as it is.
        api.create_repo(name, private=True if target.private else None, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=target.commit_message or f"Add {folder.name}, written by moe_jax",
        )
    return str(commit.repo_url)


def _require_writing(name: str, me: dict[str, Any]) -> None:
    """Refuses a token that may not write to `name`, as far as the hub says so."""
    owner = name.partition("/")[0]
    groups = {group["name"]: group.get("roleInOrg") for group in me.get("orgs", [])}
    if owner != me["name"] and owner not in groups:
        known = ", ".join([me["name"], *groups])
        raise CheckpointError(
            f"push to hub: {name}: you are logged in as {me['name']!r}, who owns no {owner!r}; "
            f"give one of {known} as the owner, or log in with `hf auth login`"
        )
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or (owner != me["name"] and groups[owner] == "read"):
        raise CheckpointError(
            f"push to hub: {name}: you may read there, but not write; log in with `hf auth login` "
            "and a token that may write"
        )


@contextlib.contextmanager
def _hub_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turns what the hub's client raises into one line."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except LocalTokenNotFoundError:
        raise CheckpointError(
            f"{what}: not logged in to the hub; run `hf auth login`{advice}"
        ) from None
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{what}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it{advice}"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {
            401: "the hub does not know your token; log in again with `hf auth login`",
            403: "your token may not do that; log in with `hf auth login` and one that may write",
        }.get(status, f"the hub answered {status} ({_first_line(error)})")
        raise CheckpointError(f"{what}: {reason}{advice}") from None
    except HTTPError as error:
        raise CheckpointError(
            f"{what}: the hub cannot be reached ({_first_line(error)}){advice}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # of the client, and of its fast transfer
        raise CheckpointError(f"{what} ({_first_line(error)}){advice}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
