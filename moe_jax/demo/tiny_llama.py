"""A tiny random Llama in the Hugging Face format, and its tokenizer; without torch."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TINY_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "float32",
    "eos_token_id": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 352,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 640,
}

_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def tensor_shapes(hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama checkpoint; weights are [out, in]."""
    d, f = hf_config["hidden_size"], hf_config["intermediate_size"]
    q = hf_config["num_attention_heads"] * hf_config["head_dim"]
    kv = hf_config["num_key_value_heads"] * hf_config["head_dim"]
    linears = {
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (hf_config["vocab_size"], d)}
    for i in range(hf_config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (d,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        for name, shape in linears.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if hf_config["attention_bias" if "attn" in name else "mlp_bias"]:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (d,)
    if not hf_config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (hf_config["vocab_size"], d)
    return shapes


def random_tensors(hf_config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random float32 tensors: normal weights and biases, and norms near one.

    Norms of one and biases of zero would be usual for pre-training, but would hide errors in tests.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(hf_config).items():
        value = rng.standard_normal(shape, dtype=np.float32) * hf_config["initializer_range"]
        tensors[name] = 1.0 + value if "norm" in name else value
    return tensors


def write_checkpoint(
    folder: Path, *, seed: int, shards: int = 1, dtype: str = "float32", **overrides: Any
) -> dict[str, Any]:
    """Writes `config.json` and randomly initialized weights into `folder`.

    Args:
      folder: folder, created if it does not exist.
      seed: seed of the weights.
      shards: number of weight files.
      dtype: dtype of the weights: `float32`, `float16` or `bfloat16`.
      **overrides: fields of `config.json` that differ from `TINY_LLAMA`.

    Returns:
      The written `config.json`.
    """
    hf_config = {**TINY_LLAMA, **overrides, "dtype": dtype}
    write_model(folder, hf_config, random_tensors(hf_config, seed), shards=shards)
    return hf_config


def write_model(
    folder: Path, hf_config: dict[str, Any], tensors: dict[str, np.ndarray], *, shards: int = 1
) -> None:
    """Writes `config.json` and `tensors`, cast to the config's `dtype`, into `folder`."""
    if {name: tensor.shape for name, tensor in tensors.items()} != tensor_shapes(hf_config):
        raise ValueError(
            "names or shapes of the tensors differ from those that the config describes"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    cast = {
        name: np.ascontiguousarray(tensor.astype(_DTYPES[hf_config["dtype"]]))
        for name, tensor in tensors.items()
    }
    if shards == 1:
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(cast)
    per_shard = math.ceil(len(names) / shards)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: cast[name] for name in names[index * per_shard : (index + 1) * per_shard]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_json = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in cast.values())},
        "weight_map": weight_map,
    }
    text = json.dumps(index_json, indent=2) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


BOS, EOS = "<s>", "</s>"

# Roles are plain words, so that no special tokens are needed.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which puts `BOS` in front of each text.

    Args:
      texts: training texts; equal texts give equal tokenizers.
      vocab_size: maximum number of tokens, including the 256 bytes and the two special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    # A space is put before the first word of each line, as Llama's tokenizer does for a text, so
    # that the tokens of a word do not depend on its position. There is none after a last line
    # break, so that the tokens of a prompt are a prefix of those of prompt and completion.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\n(?=\S)"), "\n ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `tokenizer` into `folder` in the Hugging Face format."""
    tokenizer.save_pretrained(folder)
