"""Data sets on the hub: their ids, and the files of their repositories."""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from moe_jax.data.files import file_kind
from moe_jax.errors import DataError
from moe_jax.files.hub_log import quiet_retries

HUB_SCHEME = "hf://"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubAddress(NamedTuple):
    """A data set on the hub, or files of its repository.

    Attributes:
      dataset: id of the data set.
      revision: branch, tag or commit; None is the main branch.
      files: file, folder or pattern in the repository; empty for the whole data set.
    """

    dataset: str
    revision: str | None
    files: str


def hub_address(path: str) -> HubAddress | None:
    """Parts of a hub id or of `hf://datasets/OWNER/NAME[@REVISION][/FILES]`; None if local.

    A local file or folder of the same name as a hub id wins.

    Raises:
      DataError: an address that begins with `hf://` is not one of a data set.
    """
    if path.startswith(HUB_SCHEME):
        from huggingface_hub.utils import parse_hf_uri

        try:
            uri = parse_hf_uri(path)
        except ValueError:
            uri = None
        if uri is None or uri.type != "dataset":
            raise DataError(
                f"{path}: is not the address of a data set; write "
                "hf://datasets/OWNER/NAME[@REVISION][/FILE, FOLDER OR PATTERN]"
            )
        return HubAddress(uri.id, uri.revision, uri.path_in_repo)
    is_local = (
        path.startswith((".", "/", "~"))
        or file_kind(Path(path)) is not None
        or _ID.fullmatch(path) is None
        or Path(path).exists()
    )
    return None if is_local else HubAddress(path, None, "")


def download_files(path: str, address: HubAddress) -> str:
    """Downloads files of a data set's repository, or finds them in the hub's cache.

    Args:
      path: address as the user gave it, for messages.
      address: its parts, with files.

    Returns:
      Local file, folder or pattern.

    Raises:
      DataError: the repository cannot be read, or has no such file or folder.
    """
    from huggingface_hub import snapshot_download

    from moe_jax.data.tokenizer import first_line  # imports transformers

    wanted = [address.files, f"{address.files}/*"]
    wanted.append(address.files.replace("**/", ""))  # `**` may stand for no folder
    # The hub's library raises many types, for no network, no such id and no access.
    try:
        with quiet_retries():
            folder = snapshot_download(
                address.dataset,
                repo_type="dataset",
                revision=address.revision,
                allow_patterns=wanted,
            )
    except Exception as error:
        raise DataError(f"{path}: cannot be read from the hub ({first_line(error)})") from error
    if glob.has_magic(address.files):
        return f"{glob.escape(folder)}/{address.files}"
    if not Path(folder, address.files).exists():
        raise DataError(f"{path}: the repository has no such file or folder")
    return f"{folder}/{address.files}"
