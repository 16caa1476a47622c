"""MixLoRA on Llama-2-7B: 8 experts behind a top-2 router in each FFN, LoRA on attention.

    python train.py --config configs/llama7b_mixlora.py

trains on the public data set `yahma/alpaca-cleaned`, on all devices, and writes to
`runs/llama7b_mixlora`. The same command resumes. Your own base and data:

    python train.py --config configs/llama7b_mixlora.py --workdir runs/mine \
        --base /path/to/Llama-2-7b-hf --data /path/to/train.jsonl

The memory that a run needs, without weights, data or an accelerator:

    python train.py --config configs/llama7b_mixlora.py --plan --devices 8

Rank 16, alpha 32, 8 experts, top-2, dropout 0.05 and all seven projections; AdamW with learning
rate 2e-4, batches of 16 rows of at most 512 tokens and two epochs are the paper's
(arXiv:2404.15159, experimental setup). Comments below explain the other settings, and
`moe_jax/config/recipe.py` has the defaults that all configurations here share.
"""

from typing import Any

from moe_jax.config.recipe import ALPACA, llama_config, recipe


def get_config() -> dict[str, Any]:
    return recipe(
        "meta-llama/Llama-2-7b-hf",
        # For --plan; a run compares it with the checkpoint's config.json.
        hf_config=llama_config(
            vocab_size=32000, width=4096, ffn_width=11008, layers=32, heads=32, positions=4096
        ),
        # Half the memory of float32. Frozen weights get no updates that bfloat16 could round away.
        dtype="bfloat16",
        # Keeps 4 MB of activations per token, little more than a third, and computes 2% of a step
        # again (benchmarks/remat.md). If a step runs out of memory: more training.micro_batches,
        # "narrow", or "full".
        remat="frozen",
        # All devices share one copy of the weights: 13.5 GB do not fit next to the activations on
        # most accelerators. On a single device, -1 is 1.
        fsdp=-1,
        method="mixlora",
        rank=16,
        num_experts=8,
        top_k=2,
        dropout=0.05,
        data=ALPACA,
        schema="instruction",
        # About 1,000 rows, on which the loss is measured every 500 steps.
        held_out="2%",
        max_length=512,
        # Each length is one compilation. Batches hold rows of similar length, so little is padding.
        buckets=(128, 256),
        # The paper's batches hold 16 rows of a data set. "first_fit" packs several of them into a
        # row, which leaves almost no padding and fewer steps per epoch; divide batch_size by the
        # packing factor printed at start-up to keep their number per step.
        packing="none",
        # Rows of one optimizer step, over all devices and micro-batches.
        batch_size=16,
        epochs=2.0,
        learning_rate=2e-4,
        # The paper does not state a schedule; a short warm-up and a cosine are usual for LoRA.
        warmup_ratio=0.03,
    )
