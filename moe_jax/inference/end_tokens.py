"""Which tokens end an answer."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_jax.errors import CheckpointError

_FIELD = "eos_token_id"


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer of the base in `folder`, whichever file names them.

    `generation_config.json` and `config.json` have one id or a list of them; transformers stops at
    those. The tokenizer's end-of-text token is the one that training puts after a completion.

    Returns:
      The ids; none where nothing names any, and then an answer goes on as long as it may.

    Raises:
      CheckpointError: a file cannot be read, or names something that is no token id.
    """
    ids = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON ({error})") from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"{file}: expected an object with named fields")
        # Models that read images too keep the fields of their text model in a group.
        for group in (fields, fields.get("text_config")):
            if isinstance(group, dict):
                ids |= _ids(group.get(_FIELD), file)
    return frozenset(ids)


def _ids(value: Any, file: Path) -> set[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(
                f"{file}: {_FIELD}: expected a token id or a list of them, got {value!r}"
            )
    return set(ids)
