"""Base models and adapters by folder or hub id, and the identity of a base model.

An adapter stores the identity of the base model that it was trained on, a hash of the checkpoint's
content, so that it is not used with another one.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.errors import CheckpointError
from moe_jax.files.folders import current_folder
from moe_jax.files.hub_log import quiet_retries
from moe_jax.hf.base_content import BaseContent
from moe_jax.hf.config import read_model_config
from moe_jax.hf.key_table import module_counts
from moe_jax.hf.load import unread_tensors
from moe_jax.hf.shards import name_list, open_shards

# Files that are downloaded of a base model: no legacy weights, no second copy of the weights in
# another format, no training states. `*` also matches subfolders, which `_BASE_IGNORED` excludes.
_BASE_FILES = [
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
_BASE_IGNORED = ["*/*"]

# Files of an adapter, in this package's format or in PEFT's.
_ADAPTER_FILES = [
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


class BaseIdentity(NamedTuple):
    """Identity of a base model, as adapters store it.

    Attributes:
      path: folder or hub id as the user gave it; for messages, never compared.
      fingerprint: hash of the content, see `BaseContent.fingerprint`.
    """

    path: str
    fingerprint: str

    @property
    def sample(self) -> str:
        """Part of the fingerprint that is known at once, see `BaseContent.sample`."""
        return self.fingerprint.partition(":")[2]


@dataclass(frozen=True)
class BaseModel:
    """A base model, with or without its parameters in memory.

    Attributes:
      folder: folder of the checkpoint.
      path: folder or hub id as the user gave it.
      content: content of the weights.
      config: architecture.
      params: parameter tree; None if the weights are not loaded.
      unread: names of stored tensors beside the model, such as other heads.
    """

    folder: Path
    path: str
    content: BaseContent
    config: ModelConfig
    params: Any = None
    unread: tuple[str, ...] = ()
    _expected: list[tuple[str, CheckpointError]] = field(default_factory=list, repr=False)

    @property
    def identity(self) -> BaseIdentity:
        """Identity that adapters store; waits until all weights are hashed."""
        return BaseIdentity(self.path, self.content.fingerprint)

    @property
    def unread_note(self) -> str | None:
        """One line on stored tensors that are not read; None if all are."""
        if not self.unread:
            return None
        modules = name_list(module_counts(self.unread))
        return f"not read from {self.folder}, as no part of the model: {modules}"

    def require_trained_on(
        self, subject: str, trained_on: BaseIdentity, remedy: str, *, later: bool = False
    ) -> None:
        """Requires that this is the base model that an adapter or a run was trained on.

        Args:
          subject: adapter or run, for the message.
          trained_on: identity of its base model.
          remedy: what to do otherwise, for the message.
          later: compare only samples of the weights now if the rest is not hashed yet, and the rest
            in `require_expected`, so that both can load meanwhile.

        Raises:
          CheckpointError: the weights differ.
        """
        error = CheckpointError(
            f"{subject}: was trained on the base {trained_on.path}, and the weights in "
            f"{self.folder} differ from it; {remedy}"
        )
        if trained_on.sample != self.content.sample:
            raise error
        self._expected.append((trained_on.fingerprint, error))
        if not later or self.content.is_hashed:
            self.require_expected()

    def require_expected(self) -> None:
        """Completes the comparisons that `require_trained_on` left; waits if there are any.

        Raises:
          CheckpointError: the weights differ.
        """
        while self._expected:
            fingerprint, error = self._expected.pop()
            if fingerprint != self.content.fingerprint:
                raise error


def open_base(base: str | Path | BaseModel, revision: str | None = None) -> BaseModel:
    """Locates a base model and reads its architecture, without loading its weights.

    Their hash is computed in the background, unless it is known.

    Args:
      base: folder or hub id; a `BaseModel` is returned unchanged.
      revision: hub revision, see `resolve_checkpoint`.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or its architecture is not supported.
    """
    if isinstance(base, BaseModel):
        return base
    folder = resolve_checkpoint(base, revision)
    config = read_model_config(folder)
    with open_shards(folder) as shards:
        unread = unread_tensors(shards, config)
        return BaseModel(folder, str(base), BaseContent(shards), config, unread=unread)


def resolve_checkpoint(path: str | Path, revision: str | None = None) -> Path:
    """Local folder of a base model; a hub id is downloaded, or found in the hub's cache.

    Args:
      path: folder, used as it is, or hub id such as `owner/name`. An existing folder wins.
      revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
      CheckpointError: there is no such folder and no such model, access is denied, or the hub
        cannot be reached and the cache lacks the model.
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
    return _download(str(path), revision, _BASE_FILES, _BASE_IGNORED)


def resolve_recorded(base: BaseIdentity, revision: str | None = None) -> Path:
    """Local folder of a base model at the path that an adapter recorded in training.

    Args:
      base: identity of the base that the adapter stores.
      revision: see `resolve_checkpoint`.

    Raises:
      CheckpointError: see `resolve_checkpoint`; says that the path is that of training.
    """
    try:
        return resolve_checkpoint(base.path, revision)
    except CheckpointError as error:
        is_absolute = Path(base.path).expanduser().is_absolute()
        reason = (
            "the adapter was trained with this path"
            if is_absolute
            else "if it is a folder, its path is relative to the folder in which the adapter was "
            "trained"
        )
        raise CheckpointError(f"{error}; {reason}: give the base with --base") from None


def resolve_adapter(path: str | Path, revision: str | None = None) -> Path:
    """Local folder of an adapter; a hub id `owner/name` is downloaded, or found in the cache.

    Args:
      path: folder, used as it is, or hub id. An existing folder wins. A path that is neither is
        returned as it is, and reading it raises.
      revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
      CheckpointError: see `resolve_checkpoint`.
    """
    folder = current_folder(Path(path).expanduser())
    if folder.exists() or "/" not in str(path) or not _HUB_ID.fullmatch(str(path)):
        return folder
    return _download(str(path), revision, _ADAPTER_FILES, [])


def _download(repo_id: str, revision: str | None, files: list[str], ignored: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    subject = f"{repo_id}: no such folder, and as a hub id:"
    try:
        with quiet_retries():
            return Path(
                snapshot_download(
                    repo_id, revision=revision, allow_patterns=files, ignore_patterns=ignored
                )
            )
    except GatedRepoError:
        raise CheckpointError(
            f"{subject} its owner grants access on request; request it on the model's page, "
            f"then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{subject} the hub has no such model, or it is private; check the spelling, "
            f"or log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{subject} it has no revision {revision!r}") from None
    except HFValidationError:
        raise CheckpointError(f"{subject} the hub does not allow such a name") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{subject} the hub cannot be reached and its local cache lacks the model; download it "
            f"with `hf download {repo_id}` where there is a network, or give a local folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(f"{subject} the download failed ({reason})") from None
