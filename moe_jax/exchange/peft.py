"""PEFT: LoRA, rsLoRA and DoRA as `adapter_config.json` and `adapter_model.safetensors`.

Checked with peft 0.21. `adapter_model.bin` of older versions, and of MoE-PEFT, is read too.
"""

import re
from typing import Any

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.exchange.adapter_folder import (
    SAFETENSORS,
    AdapterFolder,
    Fields,
    read_dropout,
    read_targets,
)
from moe_jax.exchange.format import (
    FORMATS,
    AdapterFormat,
    ExportOptions,
    cannot,
    field_names,
    require_known,
)

# What `init_lora_weights` may have been: ways to draw A and B that leave the base as it is. Others
# (pissa, olora, corda, loftq) change it, and their pairs mean nothing on the original.
_INITS = (True, False, "gaussian", "eva", "orthogonal")

# Of the program that wrote it, or read only if another field says so.
_NOTES = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "name",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_name",
)

_PAIR = re.compile(r"base_model\.model\.(.*\.(\w+))\.lora_A\.weight")
_ALL = "all-linear"


@FORMATS.register("peft")
class PeftFormat(AdapterFormat):
    """One pair a projection; PEFT has no experts."""

    reads = ("LORA",)
    weights_file = SAFETENSORS
    classifies = True
    library = "peft"

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        classification = adapter.method.classification
        kind = "CausalLM" if classification is None else "SequenceClassification"
        labels = "" if classification is None else f", num_labels={classification.num_scores}"
        return (
            "from peft import PeftModel\n"
            f"from transformers import AutoModelFor{kind}\n\n"
            f'base = AutoModelFor{kind}.from_pretrained("{options.base}"{labels})\n'
            f'model = PeftModel.from_pretrained(base, "{options.name}").eval()'
        )

    def config_of(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        method = adapter.method
        if not isinstance(method, LoraConfig):
            name = METHODS.name_of(method)
            raise cannot("peft", f"method {name!r}", "PEFT has no experts behind routers")
        known = (*field_names(LowRankConfig), "target_modules", "classification")
        require_known(method, known, "", "peft")
        alpha = method.alpha
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": method.rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": method.dropout,
            "target_modules": list(method.target_modules),
            "use_rslora": method.rslora,
            "use_dora": method.dora,
            "init_lora_weights": "gaussian" if method.init == "gaussian" else True,
            "bias": "none",
            "fan_in_fan_out": False,
        }
        notes = []
        if method.classification is not None:
            config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
            count, labels = method.classification.num_scores, method.classification.describe()
            notes.append(
                f"peft keeps no names of labels: load the base with num_labels={count} ({labels}), "
                "and set its pad_token_id, by which transformers finds the last token"
            )
        return config, notes

    def method_of(
        self, peft_type: str, fields: Fields, source: AdapterFolder, model: ModelConfig
    ) -> LoraConfig:
        fields.choose("task_type", ("CAUSAL_LM",), None)
        fields.choose("bias", ("none",), "none")
        fields.ignore(*_NOTES)
        init = fields.take("init_lora_weights", Any, True)
        if init not in _INITS:
            raise fields.error(
                "init_lora_weights",
                f"{init!r} changes the base's weights too; convert the adapter with peft's "
                f"save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        init = fields.choose("lora_init", ("original", "gaussian"), init)  # MoE-PEFT's name
        dora = fields.take("use_dora", bool, False)
        if dora and not any("lora_magnitude_vector" in name for name in source.tensors):
            raise fields.error(
                "use_dora",
                f"{source.weights_file.name} has no magnitudes, which MoE-PEFT does not save; to "
                f"read it as the LoRA that MoE-PEFT itself makes of it, set use_dora to false",
            )
        return LoraConfig(
            rank=fields.take("r", int),
            alpha=fields.take("lora_alpha", float),
            dropout=read_dropout(fields, 0.0),
            init="gaussian" if init == "gaussian" else "kaiming",
            rslora=fields.take("use_rslora", bool, False),
            dora=dora,
            target_modules=_targets(fields, source),
        )


def _targets(fields: Fields, source: AdapterFolder) -> tuple[str, ...]:
    """The adapted projections; a pattern is resolved by the tensors that there are.

    Pairs of modules that it does not match are left out here and refused as left over: PEFT would
    not use them.
    """
    stated = fields.take("target_modules", Any)
    if not isinstance(stated, str):
        return read_targets(fields)
    try:
        pattern = re.compile(".*" if stated == _ALL else stated)
    except re.error as error:
        raise fields.error("target_modules", f"{stated!r} is no pattern ({error})") from None
    pairs = (match for name in source.tensors if (match := _PAIR.fullmatch(name)))
    found = {pair[2] for pair in pairs if pattern.fullmatch(pair[1])}
    if not found:
        raise fields.error("target_modules", f"{stated!r} matches no module of the adapter")
    return tuple(name for name in TARGET_MODULES if name in found)
