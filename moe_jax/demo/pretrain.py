"""Pre-trains the tiny Llama that the demo fine-tunes.

    python -m moe_jax.demo.pretrain --output moe_jax/demo/base

This is the command that made the checkpoint in `moe_jax/demo/base`. It is trained on plain
sentences only, not on instructions.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from transformers import PreTrainedTokenizerFast

from moe_jax.config.model import ComputeConfig
from moe_jax.data.batch import Batch
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.demo.corpus import instruction_rows, plain_sentences
from moe_jax.demo.tiny_llama import (
    TINY_LLAMA,
    save_tokenizer,
    train_tokenizer,
    write_checkpoint,
    write_model,
)
from moe_jax.hf.config import read_model_config
from moe_jax.hf.key_table import hf_tensors
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import row_losses

PROMPT = "bare"
"""Prompt template of the demo's instructions."""

ROWS, LENGTH = 8, 128
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05

# Lines of text that are generated and tokenized at a time.
_LINES_PER_CHUNK = 2000


def demo_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Tokenizer of the demo, trained on sentences and instructions."""
    template = load_prompt_template(PROMPT)
    train, _ = instruction_rows(seed)
    texts = [template.fill(row.instruction, row.input, "") + row.output for row in train]
    texts += plain_sentences(seed, count=8000)
    return train_tokenizer(texts, TINY_LLAMA["vocab_size"])


def packed_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Batch]:
    """Endless batches of [ROWS, LENGTH], each row filled with whole lines of new text."""
    rows: list[list[list[int]]] = []
    row: list[list[int]] = []
    while True:
        for tokens in tokenizer(plain_sentences(seed, _LINES_PER_CHUNK))["input_ids"]:
            tokens = [*tokens, tokenizer.eos_token_id]
            if sum(map(len, row)) + len(tokens) > LENGTH:
                rows.append(row)
                row = []
            row.append(tokens)
            if len(rows) == ROWS:
                yield _collate(rows)
                rows = []
        seed += 1


def _collate(rows: Sequence[Sequence[Sequence[int]]]) -> Batch:
    tokens, segment_ids, positions = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(3))
    for index, lines in enumerate(rows):
        start = 0
        for number, line in enumerate(lines, start=1):
            part = slice(start, start + len(line))
            tokens[index, part] = line
            segment_ids[index, part] = number
            positions[index, part] = np.arange(len(line))
            start += len(line)
    # The first token of a line is not predicted.
    loss_mask = (segment_ids > 0) & (positions > 0)
    zeros = np.zeros_like(tokens)
    floats = zeros.astype(np.float32)
    return Batch(tokens, loss_mask, segment_ids, positions, zeros, floats, floats)


def pretrain(folder: Path, *, steps: int, seed: int = 0, dtype: str = "bfloat16") -> float:
    """Trains all parameters of a tiny Llama on plain sentences, and writes it into `folder`.

    Args:
      folder: gets tokenizer, `config.json` and `model.safetensors`.
      steps: optimizer steps; the learning rate falls to zero over them.
      seed: random seed of the weights and the text.
      dtype: type of the written weights; training is in float32.

    Returns:
      The loss over the last steps, in nats a token.
    """
    hf_config = write_checkpoint(folder, seed=seed)
    tokenizer = demo_tokenizer(seed)
    save_tokenizer(tokenizer, folder)
    config = read_model_config(folder)
    params = load_base_params(folder, config, "float32")
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP_STEPS, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=WEIGHT_DECAY,
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree),
        ),
    )

    def loss(params: Any, batch: Batch) -> jax.Array:
        logits: Any = model.apply(
            {"params": params},
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        losses, targets = row_losses(logits, batch)
        return jnp.sum(losses) / jnp.sum(targets)

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies step counts with floats
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses, start = optimizer.init(params), [], time.monotonic()
    # The tokenizer has seen the text of `seed`; pre-training reads other text.
    for number, batch in zip(range(steps), packed_batches(tokenizer, seed + 1), strict=False):
        params, state, value = step(params, state, batch)
        losses.append(value)
        if number % 200 == 0 or number == steps - 1:
            seconds = time.monotonic() - start
            print(f"step {number}: loss {value:.4f}, {seconds:.0f} s", flush=True)
    write_model(folder, {**hf_config, "dtype": dtype}, hf_tensors(params, config))
    return float(np.mean(losses[-100:]))


def main() -> None:
    """Parses flags and pre-trains."""
    parser = argparse.ArgumentParser(description="Pre-trains the tiny Llama of the demo.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    final = pretrain(args.output, steps=args.steps, seed=args.seed)
    print(f"{args.output}: loss {final:.4f} over the last steps")


if __name__ == "__main__":
    main()
