"""Loading a checkpoint's tokenizer, and what the rest of the package asks of it."""

import hashlib
import json
from pathlib import Path

import transformers
from transformers import PreTrainedTokenizerBase

from moe_jax.errors import CheckpointError, DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
      path: a folder with a Hugging Face checkpoint, or a hub id.
      revision: the hub revision; a local folder has none.

    Raises:
      CheckpointError: there is no tokenizer, or it cannot be read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{path}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json of the "
                "model into this folder"
            )
        path = folder
    elif str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such folder; give a folder, or a hub id owner/name")
    # Libraries behind this call raise nearly every built-in type for a damaged or missing file.
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), revision=revision or "main")
    except Exception as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded ({first_line(error)}); give a checkpoint "
            "folder, or a hub id that can be reached"
        ) from error


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends a completion.

    Raises:
      DataError: the tokenizer names none, so that a model could not learn where to stop.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            f"{tokenizer.name_or_path or 'tokenizer'}: names no end-of-text token; set 'eos_token' "
            "in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What this tokenizer puts before a text by its own convention: `[bos]` or nothing.

    Read off an encoded text, because the flags that promise it (`add_bos_token`) and what the
    tokenizer does are set in different files and do not always agree.
    """
    plain = encode(tokenizer, ["a"])[0]
    dressed = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            return dressed[:start]
    return []


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text alone, without the tokens that a tokenizer adds around a text."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as training shows it to the model; a completion follows directly.

    For a prompt rendered by a chat template use `encode`: the template writes every special token.
    """
    return leading_tokens(tokenizer) + encode(tokenizer, [prompt])[0]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides which ids a text becomes, equal between processes."""
    if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls, and overridden by each of ours.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [tokenizer.get_vocab(), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    state = [
        transformers.__version__,
        type(tokenizer).__qualname__,
        content,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        leading_tokens(tokenizer),
    ]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its text, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
