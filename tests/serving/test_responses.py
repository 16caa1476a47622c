"""Log-probabilities and routing of responses: texts, offsets and bytes of their tokens."""

import pytest
from inference.tokenizers_to_try import byte_level, sentence_piece

from moe_jax.data.tokenizer import encode, encode_prompt
from moe_jax.serving.answer import AnswerRequest, OngoingAnswer, TokenRecord
from moe_jax.serving.protocol import parse_chat, parse_completion
from moe_jax.serving.responses import ResponseWriter, TokenTexts
from moe_jax.serving.service import Prepared, RequestPrompt

BEFORE, AFTER = "an \u20ac", " ab\u4f60an"
COMPLETION = {"model": "m", "prompt": BEFORE, "echo": True, "logprobs": 1}
CHAT = {"model": "m", "messages": [{"role": "user", "content": BEFORE}], "logprobs": True}


@pytest.fixture(scope="module", params=[byte_level, sentence_piece])
def tokenizer(request):
    return request.param()


def response(tokenizer, body, after, *, is_whole=True):
    """The choice of an answer of the tokens `after`."""
    parse = parse_completion if "prompt" in body else parse_chat
    settings, before = parse(body), tuple(encode_prompt(tokenizer, BEFORE))
    request = AnswerRequest(
        tokens=before,
        max_tokens=len(after) + is_whole,
        end_ids=frozenset({tokenizer.eos_token_id}),
        logprobs=settings.logprobs,
        scores_prompt="echo" in body,
        wants_routing=settings.routing,
    )
    events = []
    answer = OngoingAnswer(request, tokenizer, events.append)
    if request.scores_prompt:
        answer.add_prompt([TokenRecord(before[0])])
        answer.add_prompt([TokenRecord(token, -1.0) for token in before[1:]])
    for token in [*after, *[tokenizer.eos_token_id] * is_whole]:
        answer.add_token(TokenRecord(token, -1.0))
    prepared = Prepared((RequestPrompt(before, BEFORE),), (request,))
    writer = ResponseWriter(settings, prepared, TokenTexts(tokenizer))
    return writer.whole([events])["choices"][0]


def test_offsets_are_places_in_the_text(tokenizer):
    after = encode(tokenizer, [AFTER])[0]
    choice = response(tokenizer, COMPLETION, after)
    text, logprobs = choice["text"], choice["logprobs"]
    assert text.startswith(BEFORE) and "\u4f60" in text[len(BEFORE) :]
    special = {*tokenizer.all_special_tokens}
    found = 0
    for place, (token, offset) in enumerate(
        zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
    ):
        if token.startswith("token_id:"):
            assert text[offset] in "\u20ac\u4f60"
        elif token not in special:
            # SentencePiece leaves out the space with which a text begins.
            token = token.lstrip() if offset == 0 else token
            assert text[offset : offset + len(token)] == token, place
            found += 1
    assert found >= 5
    assert "token_id:" in "".join(logprobs["tokens"])


def test_bytes_of_tokens_join_to_the_text(tokenizer):
    choice = response(tokenizer, CHAT, encode(tokenizer, [AFTER])[0])
    content = choice["logprobs"]["content"][:-1]
    joined = b"".join(bytes(token["bytes"]) for token in content)
    assert joined.decode() == choice["message"]["content"]
    assert any(token["token"].startswith("token_id:") for token in content)


@pytest.mark.parametrize("is_whole", [True, False])
def test_texts_of_routed_tokens_join_to_the_text(tokenizer, is_whole):
    """At the end of an answer too, where half a character is cut off or replaced."""
    half = encode(tokenizer, ["an\u4f60"])[0][:-1]
    body = {"model": "m", "prompt": BEFORE, "moe_jax": {"routing": True}}
    choice = response(tokenizer, body, half, is_whole=is_whole)
    tokens = choice["moe_jax"]["tokens"]
    assert "".join(token["text"] for token in tokens) == choice["text"]
    assert choice["text"].endswith("\ufffd") == is_whole
