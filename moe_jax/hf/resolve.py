"""From what the user calls a base model, or an adapter, to a local folder."""

import re
from pathlib import Path

from moe_jax.errors import CheckpointError
from moe_jax.files.folders import current_folder

# What is downloaded of a hub model: no legacy weights, no second copy of the weights in another
# format, no training states. `*` would match into folders, hence the second list.
_WANTED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
]
_UNWANTED = ["*/*"]

# Of an adapter, in our own format or in that of PEFT.
_WANTED_OF_ADAPTERS = [
    "adapter.json",
    "training.json",
    "loss.png",
    "experts.png",
    "weights/*",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_checkpoint(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or found in the hub's cache.

    Args:
      path: a folder, used as it is, or a hub id such as `owner/name`. A folder of that name wins.
      revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
      CheckpointError: there is no such folder and no such model, it is not open to this user, or
        the hub cannot be reached and the cache does not have it.
    """
    if not str(path):
        raise CheckpointError("the base model's path is empty; give a folder or a hub id")
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path}: is a local folder, which has no revision {revision!r}; "
                f"leave the revision out"
            )
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if not _HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path}: no such folder; give a folder, or a hub id owner/name")
    return _download(str(path), revision, _WANTED, _UNWANTED)


def resolve_adapter(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter; a hub id `owner/name` is downloaded, or found in the cache.

    Args:
      path: a folder, used as it is, or a hub id. A folder of that name wins. What looks like
        neither is returned as the folder that it names, and whoever reads it says what is missing.
      revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
      CheckpointError: as in `resolve_checkpoint`.
    """
    folder = current_folder(Path(path).expanduser())
    if folder.exists() or "/" not in str(path) or not _HUB_ID.fullmatch(str(path)):
        return folder
    return _download(str(path), revision, _WANTED_OF_ADAPTERS, [])


def _download(repo_id: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"{repo_id}: no such folder, and as a hub id:"
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted
            )
        )
    except GatedRepoError:
        raise CheckpointError(
            f"{at} its owner grants access on request; ask for it on the model's page, "
            f"then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{at} the hub has no such model, or it is private; check the spelling, "
            f"or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{at} it has no revision {revision!r}") from None
    except HFValidationError:
        raise CheckpointError(f"{at} the hub does not allow such a name") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{at} the hub cannot be reached and its cache here does not have it; download it "
            f"with `hf download {repo_id}` where there is a network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{at} the download failed ({reason})") from None
