"""Uploads exports to the Hugging Face hub, after checks of name, token and visibility."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.errors import CheckpointError
from moe_jax.files.hub_log import quiet_retries

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class HubTarget(NamedTuple):
    """A repository on the hub that an export is uploaded to.

    Attributes:
      repository: name of a model repository, `OWNER/NAME`; created if it does not exist.
      private: whether the repository has to be private.
      revision: name of the branch, created from the main branch if it does not exist; None is the
        main branch.
      commit_message: message of the commit; None selects a default.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    commit_message: str | None = None


def require_access(target: HubTarget) -> None:
    """Checks that an export can be uploaded, without changing anything on the hub.

    Raises:
      CheckpointError: the repository name is invalid, there is no login, the token has no write
        access, the repository is public but has to be private, or the hub cannot be reached.
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
            f"push to hub: {name!r} is not a repository name; give OWNER/NAME, with letters, "
            "digits, '-', '_' and '.' only"
        ) from None
    api = HfApi()
    with _hub_errors(f"push to hub: {name}"), quiet_retries():
        user = api.whoami()
        _require_write_access(name, user)
        try:
            repository = api.model_info(name)
        except RepositoryNotFoundError:
            return
    if target.private and not repository.private:
        raise CheckpointError(
            f"push to hub: {name} already exists and is public; make it private on its page, or "
            "give another name"
        )


def push_folder(folder: Path, target: HubTarget) -> str:
    """Uploads a folder to the hub.

    Files of the same name are replaced, others are kept.

    Args:
      folder: a finished export.
      target: a target that passed `require_access`.

    Returns:
      URL of the repository.

    Raises:
      CheckpointError: the upload failed; the message says that `folder` is complete, and gives the
        command that uploads it.
    """
    from huggingface_hub import HfApi

    api, name, branch = HfApi(), target.repository, target.revision
    command = ["hf upload", name, str(folder), "."]
    command += ["--private"] * target.private + [f"--revision {branch}"] * (branch is not None)
    failure = f"{folder} is complete, but pushing it to {name} failed"
    with quiet_retries(), _hub_errors(failure, f"; push it with `{' '.join(command)}`"):
        # The visibility of an existing repository does not change.
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


def _require_write_access(name: str, user: dict[str, Any]) -> None:
    """Refuses a token without write access to `name`, as far as the hub reports it."""
    owner = name.partition("/")[0]
    groups = {group["name"]: group.get("roleInOrg") for group in user.get("orgs", [])}
    if owner != user["name"] and owner not in groups:
        known = ", ".join([user["name"], *groups])
        raise CheckpointError(
            f"push to hub: {name}: you are logged in as {user['name']!r}, which is not a member of "
            f"{owner!r}; give one of {known} as the owner, or log in with `hf auth login`"
        )
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read" or (owner != user["name"] and groups[owner] == "read"):
        raise CheckpointError(
            f"push to hub: {name}: you have read access only; log in with `hf auth login` and a "
            "token with write access"
        )


@contextlib.contextmanager
def _hub_errors(failure: str, advice: str = "") -> Iterator[None]:
    """Turns errors of the hub's client into one line."""
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
            f"{failure}: not logged in to the hub; run `hf auth login`{advice}"
        ) from None
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{failure}: HF_HUB_OFFLINE is set; unset it{advice}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = {
            401: "your token is invalid; log in again with `hf auth login`",
            403: "no write access; log in with `hf auth login` and a token with write access",
        }.get(status, f"the hub answered {status} ({_first_line(error)})")
        raise CheckpointError(f"{failure}: {reason}{advice}") from None
    except HTTPError as error:
        raise CheckpointError(
            f"{failure}: the hub cannot be reached ({_first_line(error)}){advice}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # from the client or its fast transfer
        raise CheckpointError(f"{failure} ({_first_line(error)}){advice}") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
