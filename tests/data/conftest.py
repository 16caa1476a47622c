"""Tokenizers that are small enough to reason about, built here."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.tokenized_source import tokenize_source

CORPUS = [
    "Carry out the task below.\n\n## Task\nName three colors.\n\n## Answer\nRed, green and blue.",
    "The quick brown fox jumps over the lazy dog. The dog sleeps.\n\n\nThe fox runs on and on.",
    "What is the capital of France? The capital of France is Paris.\nHello there, Paris!",
] * 4

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

WORDS = list("abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="session")
def word_tokenizer():
    """One token per word: `<s>` is 1 and leads, `</s>` is 2 and ends, `a` is 3, `b` is 4, ..."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def metaspace_tokenizer():
    """As SentencePiece: a mark before the text, bytes for unknown characters, BOS by convention."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *bytes_],
        show_progress=False,
    )
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    # Without line breaks and "H", which are then bytes, as in Llama's vocabulary.
    trained.train_from_iterator(
        [text.replace("\n", " ").replace("H", "") for text in CORPUS], trainer
    )
    model = json.loads(trained.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", model["vocab"]["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def byte_tokenizer():
    """As GPT-2: bytes, no mark, no BOS; with a chat template of the usual form."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|start|>", "<|stop|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>", "<|stop|>"],
        chat_template=CHATML,
    )


@pytest.fixture(params=["metaspace_tokenizer", "byte_tokenizer", "word_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines or a JSON list, or text, to a file and returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(json.dumps(content))
        return str(path)

    return write_file


@pytest.fixture
def data_config(tmp_path):
    """DataConfig with its cache in the test's folder."""

    def make(train, **fields):
        train = train if isinstance(train, dict) else {"only": train}
        return DataConfig(
            train=train, **{"max_length": 64, "cache_dir": str(tmp_path / "cache"), **fields}
        )

    return make


@pytest.fixture
def completions(write):
    """A source of prompt/completion rows."""

    def make(rows, name="rows.jsonl", **fields):
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
        return SourceConfig(path=write(name, rows), schema="completion", **fields)

    return make


@pytest.fixture
def run(data_config, word_tokenizer):
    """Tokenized rows as (ids, targets), where targets are the ids that the mask marks."""

    def tokenize_rows(source, tokenizer=word_tokenizer, **fields):
        result = tokenize_source("only", source, data_config(source, **fields), tokenizer)
        rows = result.sequences(np.arange(len(result.kept)))
        ids = [row.tokens.tolist() for row in rows]
        masks = [row.loss_mask.tolist() for row in rows]
        assert [len(row) for row in ids] == [len(mask) for mask in masks] == list(result.lengths)
        targets = [
            [token for token, is_target in zip(row, mask, strict=True) if is_target]
            for row, mask in zip(ids, masks, strict=True)
        ]
        return list(zip(ids, targets, strict=True)), result

    return tokenize_rows
