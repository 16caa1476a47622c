"""Configurations with a default for every field: a configuration file says what differs.

`recipe(BASE)` fine-tunes a base with MixLoRA on a public instruction data set. Rank, alpha,
experts, dropout, optimizer, batch and epochs are those of the MixLoRA paper (arXiv:2404.15159,
experimental setup); `configs/llama7b_mixlora.py` gives the reasons for the other settings.
"""

from collections.abc import Mapping
from typing import Any

ALPACA = "yahma/alpaca-cleaned"
"""Instruction data set on the hub: 51,760 rows of instruction, input and output."""

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

DELTA_NET_PROJECTIONS = ("in_proj_qkv", "in_proj_z", "out_proj")
"""The wide projections of linear attention. The narrow ones have fewer outputs than most ranks."""

_WIDTH, _RATE, _EXPONENT = 4096, 2e-4, 0.78


_PREFERENCE_SHARE = 1 / 40


def learning_rate_for(width: int, preference: str | None = None) -> float:
    """Peak learning rate for a base of this width, with two significant digits.

    It is the MixLoRA paper's 2e-4 at the width 4096 of Llama-2-7B, and grows as the width falls:
    the best learning rate of LoRA on Llama models is proportional to width to the power -0.78
    (J. Schulman et al., "LoRA Without Regret", Thinking Machines Lab, 2025).
    With a preference loss it is a fortieth: the Alignment Handbook trains the same low-rank
    adapters with 2e-4 and with 5e-6 (`recipes/zephyr-7b-beta/{sft,dpo}/config_qlora.yaml`).
    """
    share = 1.0 if preference is None else _PREFERENCE_SHARE
    return float(f"{share * _RATE * (_WIDTH / width) ** _EXPONENT:.1e}")


def llama_config(
    *,
    vocab_size: int,
    width: int,
    ffn_width: int,
    layers: int,
    heads: int,
    positions: int,
    kv_heads: int | None = None,
    rope_theta: float = 10000.0,
    tied: bool = False,
    architecture: str = "LlamaForCausalLM",
    model_type: str = "llama",
    rms_norm_eps: float = 1e-5,
    **others: Any,
) -> dict[str, Any]:
    """Fields of the `config.json` of a Llama, or of a family with the same fields.

    Args:
      vocab_size, width, ffn_width, layers, heads: sizes of the model.
      positions: `max_position_embeddings`.
      kv_heads: number of key and value heads; None is `heads`.
      rope_theta: base of RoPE.
      tied: True if the head is the transposed embedding.
      architecture: name of the model class in transformers.
      model_type: its `model_type`.
      rms_norm_eps: epsilon of the norms.
      others: further fields, such as `rope_scaling`.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": ffn_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": rope_theta,
        "tie_word_embeddings": tied,
        **others,
    }


def recipe(
    base: str,
    *,
    hf_config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    attention: str = "auto",
    remat: str = "frozen",
    data_axis: int = 1,
    fsdp: int = -1,
    method: str = "mixlora",
    rank: int = 16,
    num_experts: int = 8,
    top_k: int = 2,
    dropout: float = 0.05,
    target_modules: tuple[str, ...] = ALL_PROJECTIONS,
    data: str = ALPACA,
    schema: str | None = "instruction",
    columns: Mapping[str, str] | None = None,
    held_out: str | None = "2%",
    max_length: int = 512,
    buckets: tuple[int, ...] = (128, 256),
    packing: str = "none",
    batch_size: int = 16,
    micro_batches: int = 1,
    epochs: float | None = 2.0,
    steps: int | None = None,
    learning_rate: float | None = None,
    warmup_ratio: float = 0.03,
    preference: str | None = None,
) -> dict[str, Any]:
    """Configuration of a run that trains one adapter, `default`, as nested dicts.

    Args:
      base: folder or hub id of the base model.
      hf_config: fields of its `config.json`, for a plan without the checkpoint; see `BaseConfig`.
      dtype: dtype of the frozen weights and of the computation.
      data_axis, fsdp: sizes of the mesh, see `MeshConfig`; by default all devices share one copy of
        the weights.
      method: `mixlora`, or another method with the same fields, such as `lora` or `loramoe`.
      rank: rank of the pairs on attention and of each expert; alpha is twice the rank.
      num_experts: number of experts of an FFN, for methods with experts.
      top_k: number of experts of a token, for MixLoRA.
      target_modules: names of the adapted projections.
      data: file, folder or hub id of the training data.
      schema: see `SourceConfig`; None finds it from the columns.
      columns: column names by field of the schema, where they differ.
      held_out: part at the end of the data that is kept for validation, `2%` or a number of rows;
        None trains on all rows.
      learning_rate: peak learning rate; None is `learning_rate_for` the width in `hf_config`.
      warmup_ratio: see `ScheduleConfig`; the schedule is a cosine to a tenth of the peak.
      preference: name of a preference loss; None for supervised fine-tuning.
      attention, remat, dropout, max_length, buckets, packing, batch_size, micro_batches, epochs,
        steps: fields of the same name.
    """
    if learning_rate is None:
        width = (hf_config or {}).get("hidden_size", _WIDTH)
        learning_rate = learning_rate_for(width, preference)
    adapter = {
        "method": method_fields(method, rank, num_experts, top_k, dropout, target_modules),
        "data": data_sets(data, schema, held_out, columns)
        | {"max_length": max_length, "buckets": buckets, "packing": packing},
        "optimizer": optimizer_fields(learning_rate, warmup_ratio),
        "batch_size": batch_size,
    }
    if preference is not None:
        adapter["preference"] = {"name": preference}
    architecture = None if hf_config is None else dict(hf_config)
    return {
        "base": {"path": base, "param_dtype": dtype, "hf_config": architecture},
        "compute": {"dtype": dtype, "attention": attention, "remat": remat},
        "mesh": {"data": data_axis, "fsdp": fsdp, "tensor": 1},
        "adapters": {"default": adapter},
        "training": {
            "epochs": None if steps is not None else epochs,
            "steps": steps,
            "micro_batches": micro_batches,
            "log_every": 10,
            "eval_every": 500,
        },
        "checkpoints": {"every": 200, "keep": 2},
    }


def optimizer_fields(learning_rate: float, warmup_ratio: float) -> dict[str, Any]:
    """Fields of `OptimizerConfig`; see `recipe`."""
    schedule = {"kind": "cosine", "warmup_ratio": warmup_ratio, "final_fraction": 0.1}
    return {"name": "adamw", "learning_rate": learning_rate, "schedule": schedule}


def data_sets(
    path: str,
    schema: str | None,
    held_out: str | None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Fields `train` and `validation` of `DataConfig`; see `recipe`."""
    source: dict[str, Any] = {"path": path, **({} if schema is None else {"schema": schema})}
    if columns:
        source["columns"] = dict(columns)
    if held_out is None:
        return {"train": {"train": source}}
    return {
        "train": {"train": {**source, "split": f"train[:-{held_out}]"}},
        "validation": {"held_out": {**source, "split": f"train[-{held_out}:]"}},
    }


def method_fields(
    name: str,
    rank: int,
    num_experts: int = 8,
    top_k: int = 2,
    dropout: float = 0.05,
    target_modules: tuple[str, ...] = ALL_PROJECTIONS,
) -> dict[str, Any]:
    """Fields of `adapters.NAME.method`; see `recipe`."""
    method: dict[str, Any] = {
        "name": name,
        "rank": rank,
        "alpha": 2.0 * rank,
        "dropout": dropout,
        "init": "kaiming",
        "target_modules": target_modules,
    }
    if name in ("mixlora", "loramoe"):
        method["num_experts"] = num_experts
    if name == "mixlora":
        method["router"] = {"name": "top_k", "top_k": top_k, "init_std": 0.02}
        # The load-balancing loss and its coefficient are those of Switch Transformer
        # (arXiv:2101.03961, section 2.2); the default of the MixLoRA authors' package `mixlora` is
        # 1e-3. The z loss, with the coefficient of ST-MoE (arXiv:2202.08906), keeps router logits
        # small.
        method["losses"] = {
            "load_balance": {"coefficient": 0.01, "scope": "per_layer"},
            "router_z": {"coefficient": 0.001, "scope": "per_layer"},
        }
    return method
