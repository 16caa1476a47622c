"""A checkpoint's tokenizer: loading it, encoding texts, and a digest of its behavior."""

import codecs
import hashlib
import importlib
import json
from pathlib import Path

import tokenizers
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
    """Loads the tokenizer of a checkpoint.

    Args:
      path: folder with a Hugging Face checkpoint, or a hub id.
      revision: revision on the hub; ignored for a local folder.

    Raises:
      CheckpointError: the tokenizer is missing or cannot be read.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise CheckpointError(
                f"{path}: holds no tokenizer; copy tokenizer.json and tokenizer_config.json of the "
                "model into this folder"
            )
        _require_converter(folder)
        path = folder
    elif str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: no such folder; give a folder, or a hub id owner/name")
    # The libraries behind this call raise nearly every built-in error for a damaged file.
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), revision=revision or "main")
    except Exception as error:
        for file in folder.glob("*.json") if folder.is_dir() else ():
            if file.read_bytes().startswith(codecs.BOM_UTF8):
                raise CheckpointError(
                    f"{file}: begins with a byte order mark, with which transformers does not read "
                    "it; save it as UTF-8 without one"
                ) from None
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded ({first_line(error)}); give a checkpoint "
            "folder, or a hub id that can be reached"
        ) from error


def _require_converter(folder: Path) -> None:
    """Requires the packages by which transformers reads `tokenizer.model`, if it is alone.

    SentencePiece writes a binary file that begins with a line feed; Tiktoken writes text.
    """
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return
    with file.open("rb") as opened:
        is_sentencepiece = opened.read(1) == b"\n"
    modules = ("sentencepiece", "google.protobuf") if is_sentencepiece else ("tiktoken",)
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            package = module.removeprefix("google.")
            raise CheckpointError(
                f"{folder}: has its tokenizer in tokenizer.model only, which transformers reads "
                f"with the package {package}; install it (pip install {package}), or copy the "
                "model's tokenizer.json into this folder"
            ) from None


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a completion.

    Raises:
      DataError: the tokenizer has none, so that a model could not learn where to stop.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise DataError(
            f"{tokenizer.name_or_path or 'tokenizer'}: names no end-of-text token; set 'eos_token' "
            "in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that this tokenizer puts before every text: `[bos]`, or an empty list.

    Taken from an encoded text, because the flag for it (`add_bos_token`) and the tokenizer's
    behavior are set in different files and do not always agree.
    """
    plain = encode(tokenizer, ["a"])[0]
    with_special = list(tokenizer("a", verbose=False)["input_ids"])
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without the special tokens that a tokenizer adds around it."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt, as in training; a completion follows directly.

    For a prompt rendered by a chat template use `encode`: the template writes every special token.
    """
    return leading_tokens(tokenizer) + encode(tokenizer, [prompt])[0]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of everything that decides the token ids of a text; equal in every process."""
    if isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # State that earlier calls left behind; every call of ours overrides it.
        content.pop("truncation", None)
        content.pop("padding", None)
    else:
        content = [tokenizer.get_vocab(), repr(sorted(tokenizer.init_kwargs.items(), key=str))]
    state = [
        transformers.__version__,
        tokenizers.__version__,
        type(tokenizer).__qualname__,
        content,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        leading_tokens(tokenizer),
    ]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
