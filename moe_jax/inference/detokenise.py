"""From tokens to text while they come, one at a time."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
"""What decoding makes of bytes that are no whole character; more bytes may complete them."""


class Detokeniser:
    """Turns the tokens that follow a prompt into the text that follows it.

    Tokens are decoded together with those before them, because what one stands for depends on its
    neighbours: a character may be spread over several, and SentencePiece tokenizers drop the blank
    in front of whatever stands first. Only the tokens since the last piece of text are decoded
    again, so that the cost of a token does not grow with the text. Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        """Begins after a prompt, of which nothing is given back.

        Args:
          tokenizer: decodes.
          prompt: the prompt's token ids.
        """
        self._tokenizer = tokenizer
        self._window = list(prompt)
        self._known = len(self._window)  # tokens of the window whose text was given already
        self._text = self._decode()

    def push(self, token: int) -> str:
        """The text that this token adds; empty while a character is not complete."""
        self._window.append(token)
        whole = self._decode()
        return "" if whole.endswith(_HALF) else self._advance(whole)

    def finish(self, *, is_cut: bool) -> str:
        """The text still held back.

        Args:
          is_cut: whether more would have followed; half a character is left out then. Otherwise it
            becomes U+FFFD, as everywhere.
        """
        whole = self._decode()
        return self._advance(whole.rstrip(_HALF) if is_cut else whole)

    def _advance(self, whole: str) -> str:
        new = whole[len(self._text) :]
        if new:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._text = self._decode()
        return new

    def _decode(self) -> str:
        text = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text
