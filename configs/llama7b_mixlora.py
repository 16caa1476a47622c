"""MixLoRA on Llama-2-7B: 8 experts behind a top-2 router in each FFN, LoRA on attention.

Rank 16, alpha 32, 8 experts, top-2, dropout 0.05 and all seven projections; AdamW with learning
rate 2e-4, batches of 16 rows of at most 512 tokens and two epochs are the paper's
(arXiv:2404.15159, experimental setup). Comments below explain the other settings.

Train on your own instructions, on all devices:

    python train.py --config configs/llama7b_mixlora.py --workdir runs/mixlora \
        --config.base.path=/path/to/Llama-2-7b-hf \
        --config.adapters.default.data.train.instructions.path=/path/to/train.jsonl

Print the memory that a run needs, without weights, data or an accelerator:

    python train.py --config configs/llama7b_mixlora.py --plan --devices 8
"""

from typing import Any

from ml_collections import ConfigDict

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def get_config() -> ConfigDict:
    config: Any = ConfigDict()

    config.base = ConfigDict()
    config.base.path = "meta-llama/Llama-2-7b-hf"
    # Half the memory of float32. Frozen weights get no updates that bfloat16 could round away.
    config.base.param_dtype = "bfloat16"
    # For --plan; a run compares it with the checkpoint's config.json.
    config.base.hf_config = LLAMA_2_7B

    config.compute = ConfigDict()
    config.compute.dtype = "bfloat16"
    config.compute.attention = "xla"  # "cudnn" on NVIDIA GPUs
    # Keeps 4 MB of activations per token, little more than a third, and computes 2% of a step again
    # (benchmarks/remat.md). If a step runs out of memory: more micro_batches, "narrow", or "full".
    config.compute.remat = "frozen"

    # All devices share one copy of the weights: 13.5 GB do not fit next to the activations on most
    # accelerators. On a single device, -1 is 1.
    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 1

    adapter: Any = ConfigDict()
    adapter.method = ConfigDict()
    adapter.method.name = "mixlora"
    adapter.method.num_experts = 8
    adapter.method.router = ConfigDict(
        {"name": "top_k", "top_k": 2, "init_std": 0.02, "jitter_noise": 0.0}
    )
    adapter.method.rank = 16
    adapter.method.alpha = 32.0
    adapter.method.dropout = 0.05
    adapter.method.init = "kaiming"
    adapter.method.target_modules = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # The load-balancing loss and its coefficient are those of Switch Transformer (arXiv:2101.03961,
    # section 2.2); the default of the MixLoRA authors' package `mixlora` is 1e-3. The z loss, with
    # the coefficient of ST-MoE (arXiv:2202.08906), keeps router logits small.
    adapter.method.losses = ConfigDict(
        {
            "load_balance": {"coefficient": 0.01, "scope": "per_layer"},
            "router_z": {"coefficient": 0.001, "scope": "per_layer"},
        }
    )

    adapter.data = ConfigDict()
    adapter.data.train = ConfigDict(
        {
            "instructions": {
                "path": "train.jsonl",
                "schema": "instruction",
                "prompt": "instruction",
                "weight": 1.0,
            }
        }
    )
    adapter.data.max_length = 512
    # Each length is one compilation. Batches hold rows of similar length, so little is padding.
    adapter.data.buckets = (128, 256)
    # The paper's batches hold 16 rows of a data set. "first_fit" packs several of them into a row,
    # which leaves almost no padding and fewer steps per epoch; divide batch_size by the packing
    # factor printed at start-up to keep their number per step.
    adapter.data.packing = "none"
    adapter.data.train_on_prompt = False

    adapter.optimizer = ConfigDict()
    adapter.optimizer.name = "adamw"
    adapter.optimizer.learning_rate = 2e-4
    adapter.optimizer.weight_decay = 0.0
    adapter.optimizer.clip_norm = 1.0
    # The paper does not state a schedule; a short warm-up and a cosine are usual for LoRA.
    adapter.optimizer.schedule = ConfigDict(
        {"kind": "cosine", "warmup_ratio": 0.03, "final_fraction": 0.1}
    )

    # Rows of one optimiser step, over all devices and micro-batches.
    adapter.batch_size = 16
    config.adapters = ConfigDict({"default": adapter})

    config.training = ConfigDict()
    config.training.epochs = 2.0
    config.training.micro_batches = 1
    config.training.seed = 0
    config.training.log_every = 10
    config.training.eval_every = 0

    config.checkpoints = ConfigDict()
    config.checkpoints.every = 200
    config.checkpoints.keep = 2

    return config
