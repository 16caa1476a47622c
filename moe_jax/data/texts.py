"""Texts that are to be classified, as token ids.

A row becomes the tokens that its tokenizer puts in front of a text and those of the text; of two
texts, of both with a line break between them. Nothing follows: the row is classified at its last
token, as transformers' sequence classifiers do.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from moe_jax.data.tokenizer import encode, leading_tokens

BETWEEN = "\n"
"""What stands between two texts."""


def encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each text, or of each pair of texts; the second is empty where there is one."""
    lead = leading_tokens(tokenizer)
    joined = [BETWEEN.join((first, second)) if second else first for first, second in texts]
    return [[*lead, *ids] for ids in encode(tokenizer, joined)]
