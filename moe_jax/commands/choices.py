"""What commands offer, known without importing the libraries that do it.

So `--help` and a wrong flag are answered at once. `tests/test_cli.py` holds these to what there is.
"""

EXPORT_FORMATS = {
    "llama": "one dense model of the base's family: LoRA exactly, MixLoRA approximately",
    "mixlora": "MixLoRA, LoRAMoE, MoLA, LoRA for MoE-PEFT; top-k MixLoRA for the mixlora package",
    "mixtral": "top-k MixLoRA and its base as one Mixtral (Llama, Mistral) or Qwen3-MoE (Qwen3)",
    "moe_jax": "every adapter in this library's own format, with a model card, for the hub",
    "peft": "LoRA, rsLoRA, DoRA for peft",
}
"""The names of `checkpoints.formats.FORMATS`, and what they are."""

EXPORT_WEIGHTS = ("average", "utilisation")
"""See `checkpoints.formats.format.Weighting`."""

ROUTERS = ("soft", "switch", "top_k", "top_p")
"""The names of `adapters.router.ROUTERS`."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""See `adapters.targets.TARGET_MODULES`."""

UPCYCLE_TO = ("mixlora", "loramoe", "mola")
"""See `surgery.upcycle.UPCYCLED`."""

GROW_NOISE = 0.01
"""See `surgery.grow.DEFAULT_NOISE`."""

MERGE_WEIGHTS = ("average", "utilisation")
"""See `surgery.merge.Weighting`."""
