"""The `openai` client against the server, compared with `moe_jax.generate` and with one pass."""

import jax
import numpy as np
import openai
import pytest
from inference.tokenizers_to_try import byte_level
from serving.running_server import compiled_while_serving
from tolerances import FLOAT32_LOGITS

import moe_jax
from moe_jax.data.tokenizer import encode_prompt

TOKENIZER = byte_level()
PROMPT = "The fox and the crow went to the"
NAMES = ("tiny", "mix", "plain", "louder")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(served):
    return moe_jax.AdaptedModel(served.base, served.adapters)


def adapter_of(name):
    return None if name == "tiny" else name


def test_models(client, served):
    listed = {model.id: model.to_dict() for model in client.models.list()}
    assert tuple(listed) == NAMES
    same = {"num_layers": 2, "chat": True, "max_length": 96}
    base = {"kind": "base", "method": None, "num_experts": None, "top_k": None, **same}
    assert listed["tiny"]["moe_jax"] == base
    mixture = {"kind": "adapter", "method": "mixlora", "num_experts": 4, "top_k": 2, **same}
    assert listed["louder"]["moe_jax"] == mixture
    assert listed["plain"]["moe_jax"]["method"] == "lora"
    assert client.models.retrieve("mix").id == "mix"
    with pytest.raises(openai.NotFoundError, match="did you mean 'mix'"):
        client.models.retrieve("mixx")


def test_greedy_completions_equal_generate(client, model):
    expected = moe_jax.generate(
        model, [PROMPT] * 4, [adapter_of(n) for n in NAMES], max_new_tokens=24
    )
    assert len(set(expected)) == 4
    for name, text in zip(NAMES, expected, strict=True):
        answer = client.completions.create(model=name, prompt=PROMPT, temperature=0, max_tokens=24)
        assert answer.choices[0].text == text
        count = len(encode_prompt(TOKENIZER, PROMPT))
        assert answer.usage.prompt_tokens == count
        assert answer.usage.total_tokens == count + answer.usage.completion_tokens
    several = client.completions.create(
        model="mix", prompt=[PROMPT, "A"], temperature=0, max_tokens=24
    )
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == expected[1]


def test_streams_equal_whole_answers(client):
    settings = {"model": "mix", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**settings).choices[0]
    chunks = [*client.completions.create(**settings, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert len(chunks) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.finish_reason]
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    *others, last = client.completions.create(**settings, **usage)
    assert last.choices == [] and last.usage.completion_tokens == 24
    assert len(others) == len(chunks)


def test_samples_are_those_of_generate_with_the_same_seed(client, model):
    sampling = {"temperature": 1.3, "top_p": 0.9}
    expected = moe_jax.generate(
        model, PROMPT, "louder", max_new_tokens=16, samples=3, seed=5, top_k=50, **sampling
    )
    assert len(set(expected)) == 3
    settings = {"model": "louder", "prompt": PROMPT, "max_tokens": 16, "n": 3, **sampling}
    more = {"extra_body": {"top_k": 50}}
    answer = client.completions.create(**settings, seed=5, **more)
    assert [choice.text for choice in answer.choices] == expected
    other = client.completions.create(**settings, seed=6, **more)
    assert [choice.text for choice in other.choices] != expected


def test_conversations_equal_generate(client, model):
    (expected,) = moe_jax.generate(model, [MESSAGES], "mix", max_new_tokens=20)
    settings = {"model": "mix", "messages": MESSAGES, "temperature": 0}
    answer = client.chat.completions.create(**settings, max_completion_tokens=20).choices[0]
    assert answer.message.content == expected
    assert answer.message.role == "assistant"
    chunks = [*client.chat.completions.create(**settings, max_tokens=20, stream=True)]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content for delta in deltas) == expected
    assert [delta.role for delta in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "is it?"}]
    in_parts = [MESSAGES[0], {"role": "user", "content": parts}]
    again = client.chat.completions.create(**{**settings, "messages": in_parts}, max_tokens=20)
    assert again.choices[0].message.content == expected


def test_stop_strings_end_an_answer_before_them(client, model):
    (whole,) = moe_jax.generate(model, [PROMPT], "plain", max_new_tokens=24)
    stop = whole[9:12]
    settings = {"model": "plain", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    answer = client.completions.create(**settings, stop=[stop, "never"]).choices[0]
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("name", ["tiny", "mix"])
def test_logprobs_are_those_of_one_pass(client, model, name):
    answer = client.completions.create(
        model=name, prompt=PROMPT, temperature=0, max_tokens=5, logprobs=3, echo=True
    ).choices[0]
    ids = encode_prompt(TOKENIZER, PROMPT)
    prompt = len(ids)
    for _ in range(5):
        log_probs = jax.nn.log_softmax(model(np.array([ids]), adapter_of(name))[0])
        ids.append(int(log_probs[-1].argmax()))
    log_probs = jax.nn.log_softmax(model(np.array([ids]), adapter_of(name))[0])
    found = answer.logprobs
    assert answer.text.startswith(PROMPT)
    assert "".join(found.tokens[1:prompt]).lstrip() == PROMPT
    pieces = [piece.replace("Ġ", " ") for piece in TOKENIZER.convert_ids_to_tokens(ids[prompt:])]
    pairs = zip(ids[prompt:], pieces, strict=True)
    assert found.tokens[prompt:] == [p if p.isascii() else f"token_id:{i}" for i, p in pairs]
    for place, token in enumerate(ids[1:]):
        expected = log_probs[place]
        actual = found.token_logprobs[place + 1]
        np.testing.assert_allclose(actual, expected[token], rtol=0, atol=FLOAT32_LOGITS)
        top = sorted(found.top_logprobs[place + 1].values())[::-1]
        best = np.sort(expected)[::-1][:3]
        np.testing.assert_allclose(top[:3], best, rtol=0, atol=FLOAT32_LOGITS)
        assert len(top) == 3 + (actual < best[2])


def test_scores_alone_and_of_conversations(client, model):
    settings = {"model": "mix", "prompt": PROMPT, "temperature": 0}
    alone = client.completions.create(**settings, max_tokens=0, logprobs=0, echo=True)
    with_answer = client.completions.create(**settings, max_tokens=3, logprobs=0, echo=True)
    scores = alone.choices[0].logprobs.token_logprobs
    assert scores[1:] == with_answer.choices[0].logprobs.token_logprobs[1 : len(scores)]
    assert alone.choices[0].text == PROMPT and alone.usage.completion_tokens == 0
    chat = client.chat.completions.create(
        model="mix", messages=MESSAGES, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    ).choices[0]
    content = chat.logprobs.content
    assert len(content) == 4 and all(len(token.top_logprobs) == 2 for token in content)
    assert all(t.logprob == t.top_logprobs[0].logprob for t in content)  # greedy


def test_penalties(client, model):
    """A frequency penalty of 2 changes the answer as lowering the logits by hand does."""
    ids = encode_prompt(TOKENIZER, PROMPT)
    start, counts = len(ids), np.zeros(640)
    for _ in range(12):
        logits = np.asarray(model(np.array([ids]), "plain")[0, -1])
        ids.append(int(np.argmax(logits - 2.0 * counts - 1.5 * (counts > 0))))
        counts[ids[-1]] += 1
    expected = TOKENIZER.decode(ids[start:], skip_special_tokens=True)
    settings = {"model": "plain", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    penalties = {"frequency_penalty": 2.0, "presence_penalty": 1.5}
    assert client.completions.create(**settings, **penalties).choices[0].text == expected
    assert client.completions.create(**settings).choices[0].text != expected


def test_routing_of_generated_tokens(client, model, served):
    body = {"moe_jax": {"routing": True}}
    settings = {"prompt": PROMPT, "temperature": 0, "extra_body": body}
    answer = client.completions.create(model="mix", max_tokens=2, **settings).choices[0]
    choice = answer.to_dict()
    tokens = choice["moe_jax"]["tokens"]
    assert "".join(token["text"] for token in tokens) == choice["text"]
    # The pass that chose a token is at the place of the token before it.
    text = PROMPT + choice["text"]
    report = moe_jax.inspect_routing(served.adapters["mix"], {"text": [text]}, served.base)
    (row,) = report.rows
    first = len(row.tokens) - len(tokens)
    assert row.tokens[first:].tolist() == [token["id"] for token in tokens]
    for place, token in enumerate(tokens):
        weights = row.weights[:, first - 1 + place]
        for layer in range(2):
            best = np.argsort(-weights[layer])[:2]
            assert token["experts"][layer] == best.tolist()
            np.testing.assert_allclose(token["weights"][layer], weights[layer][best], atol=1e-4)
    stream = client.completions.create(model="plain", max_tokens=6, **settings, stream=True)
    chunks = [token for c in stream for token in c.choices[0].to_dict()["moe_jax"]["tokens"]]
    assert len(chunks) == 6 and all(token["experts"] is None for token in chunks)
    plain = client.completions.create(model="mix", prompt=PROMPT, max_tokens=2)
    assert "moe_jax" not in plain.choices[0].to_dict()


def test_tools_reach_the_template(client, served):
    """The demo's template writes no tools; one that does sees those of the request."""
    service = served.service
    tokenizer, template = service.tokenizer, service.tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    without = client.chat.completions.create(**settings).usage.prompt_tokens
    tokenizer.chat_template = "{{ tools[0].function.name if tools else '' }}" + template
    try:
        used = client.chat.completions.create(**settings, tools=tools).usage.prompt_tokens
        unused = client.chat.completions.create(**settings, tools=tools, tool_choice="none")
    finally:
        tokenizer.chat_template = template
    assert used > without
    assert unused.usage.prompt_tokens == without


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="mox", prompt="a")
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="fit into the context of 96") as long:
        client.completions.create(model="mix", prompt=PROMPT, max_tokens=90)
    assert long.value.code == "context_length_exceeded" and long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="logit_bias: is not supported"):
        client.completions.create(model="mix", prompt="a", logit_bias={"3": 1})


def test_nothing_compiles_while_serving(served):
    """Every other test of this module ran before."""
    assert served.service.engine.compilations == served.compilations
    assert compiled_while_serving(served.service.engine) == 0
