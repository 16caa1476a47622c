"""Two kinds of tokenizers: byte-level as in the demo base, and SentencePiece as in Llama."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from moe_jax.data.tokenizer import load_tokenizer

DEMO_BASE = Path(__file__).parents[2] / "moe_jax" / "demo" / "base"


def byte_level():
    """Tokenizer of the demo base: byte-level, without a leading space."""
    return load_tokenizer(DEMO_BASE)


def sentence_piece():
    """Tokenizer with a leading space and bytes for unknown characters; decodes like Llama 2."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz.", "\u2581a", "\u2581b", "an", "\u2581an"]
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "n"), ("\u2581", "an")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
