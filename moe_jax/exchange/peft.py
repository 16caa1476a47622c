"""The peft format: LoRA, rsLoRA and DoRA in `adapter_config.json` and `adapter_model.safetensors`.

Tested with peft 0.21. `adapter_model.bin` of older versions and of MoE-PEFT can be imported too.
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
    SAFETENSORS_FILE,
    AdapterFolder,
    ConfigFields,
    read_dropout,
    read_target_modules,
)
from moe_jax.exchange.format import (
    FORMATS,
    AdapterFormat,
    ExportOptions,
    field_names,
    not_expressible,
    require_known,
)

# Values of `init_lora_weights` that leave the base unchanged. The others (pissa, olora, corda,
# loftq) modify the base, so that their pairs are invalid on the original.
_INITS = (True, False, "gaussian", "eva", "orthogonal")

# Fields about the program that wrote the adapter, or without effect on their own.
_IGNORED_FIELDS = (
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

_LORA_A = re.compile(r"base_model\.model\.(.*\.(\w+))\.lora_A\.weight")
_ALL_LINEAR = "all-linear"


@FORMATS.register("peft")
class PeftFormat(AdapterFormat):
    """LoRA, rsLoRA and DoRA, one pair a projection; PEFT has no experts behind routers."""

    peft_types = ("LORA",)
    weights_file = SAFETENSORS_FILE
    classifies = True
    library = "peft"

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        classification = adapter.method.classification
        kind = "CausalLM" if classification is None else "SequenceClassification"
        labels = "" if classification is None else f", num_labels={classification.num_scores}"
        return (
            "from peft import PeftModel\n"
            f"from transformers import AutoModelFor{kind}\n\n"
            f'base = AutoModelFor{kind}.from_pretrained("{options.base}"{labels})\n'
            f'model = PeftModel.from_pretrained(base, "{options.location}").eval()'
        )

    def adapter_config(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        method = adapter.method
        if not isinstance(method, LoraConfig):
            name = METHODS.name_of(method)
            raise not_expressible("peft", f"method {name!r}", "PEFT has no experts behind routers")
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
                f"peft does not store label names: load the base with num_labels={count} "
                f"({labels}), and set its pad_token_id, by which transformers finds the last token"
            )
        return config, notes

    def parse_method(
        self, peft_type: str, fields: ConfigFields, source: AdapterFolder, model: ModelConfig
    ) -> LoraConfig:
        fields.choose("task_type", ("CAUSAL_LM",), None)
        fields.choose("bias", ("none",), "none")
        fields.ignore(*_IGNORED_FIELDS)
        init = fields.take("init_lora_weights", Any, True)
        if init not in _INITS:
            raise fields.error(
                "init_lora_weights",
                f"{init!r} changes the weights of the base; convert the adapter with peft's "
                f"save_pretrained(path_initial_model_for_weight_conversion=...)",
            )
        init = fields.choose("lora_init", ("original", "gaussian"), init)  # MoE-PEFT's name
        dora = fields.take("use_dora", bool, False)
        if dora and not any("lora_magnitude_vector" in name for name in source.tensors):
            raise fields.error(
                "use_dora",
                f"{source.weights_file.name} has no magnitudes, which MoE-PEFT does not save; to "
                f"read it as a LoRA, as MoE-PEFT itself does, set use_dora to false",
            )
        return LoraConfig(
            rank=fields.take("r", int),
            alpha=fields.take("lora_alpha", float),
            dropout=read_dropout(fields, 0.0),
            init="gaussian" if init == "gaussian" else "kaiming",
            rslora=fields.take("use_rslora", bool, False),
            dora=dora,
            target_modules=_target_modules(fields, source),
        )


def _target_modules(fields: ConfigFields, source: AdapterFolder) -> tuple[str, ...]:
    """Names of the adapted projections; a pattern is resolved against the names of the tensors.

    PEFT does not use pairs of modules that the pattern does not match. They are left out here and
    refused later as unexpected tensors.
    """
    value = fields.take("target_modules", Any)
    if not isinstance(value, str):
        return read_target_modules(fields)
    try:
        pattern = re.compile(".*" if value == _ALL_LINEAR else value)
    except re.error as error:
        raise fields.error(
            "target_modules", f"{value!r} is not a valid pattern ({error})"
        ) from None
    pairs = (match for name in source.tensors if (match := _LORA_A.fullmatch(name)))
    matched = {pair[2] for pair in pairs if pattern.fullmatch(pair[1])}
    if not matched:
        raise fields.error("target_modules", f"{value!r} matches no module of the adapter")
    return tuple(name for name in TARGET_MODULES if name in matched)
