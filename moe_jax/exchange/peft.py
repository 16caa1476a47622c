"""The peft format: LoRA, rsLoRA and DoRA in `adapter_config.json` and `adapter_model.safetensors`.

Tested with peft 0.21. `adapter_model.bin` of older versions and of MoE-PEFT can be imported too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS, AdapterMethod
from moe_jax.adapters.new_tokens import token_range, total_vocab_size
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.exchange.adapter_folder import (
    SAFETENSORS_FILE,
    AdapterFolder,
    ConfigFields,
    read_dropout,
)
from moe_jax.exchange.format import (
    FORMATS,
    AdapterFormat,
    ExportOptions,
    field_names,
    not_expressible,
    require_known,
)
from moe_jax.exchange.peft_modules import PairSize, adapted_modules, kernels, modules_of
from moe_jax.exchange.peft_pairs import MERGE, checked_pairs, leaves_from_pairs
from moe_jax.hf.base_model import BaseModel
from moe_jax.loaded.adapter_base import expected_leaves

# Values of `init_lora_weights` that leave the base unchanged. The others modify the base, so that
# their pairs are invalid on the original; peft can convert those of `_CONVERTIBLE_INITS`.
_INITS = (True, False, "gaussian", "eva", "mica", "orthogonal")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")

# Fields about the program that wrote the adapter, or without effect on their own. peft itself
# resets `fan_in_fan_out` on the layers' projections, and reads a configuration of an initialization
# only with that value of `init_lora_weights`.
_IGNORED_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "name",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_name",
    "unsloth_fixed",
)


@FORMATS.register("peft")
class PeftFormat(AdapterFormat):
    """LoRA, rsLoRA and DoRA, one pair a projection; PEFT has no experts behind routers."""

    peft_types = ("LORA",)
    weights_file = SAFETENSORS_FILE
    classifies = True
    adds_tokens = True
    library = "peft"

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        classification = adapter.method.classification
        kind = "CausalLM" if classification is None else "SequenceClassification"
        labels = "" if classification is None else f", num_labels={classification.num_scores}"
        size = total_vocab_size(adapter.model.vocab_size, [adapter.method])
        resize = (
            f"base.resize_token_embeddings({size})\n" if size > adapter.model.vocab_size else ""
        )
        names, tokenizer = f"AutoModelFor{kind}", ""
        if adapter.method.new_tokens:
            names += ", AutoTokenizer"
            tokenizer = f'\ntokenizer = AutoTokenizer.from_pretrained("{options.location}")'
        return (
            "from peft import PeftModel\n"
            f"from transformers import {names}\n\n"
            f'base = AutoModelFor{kind}.from_pretrained("{options.base}"{labels})\n'
            f"{resize}"
            f'model = PeftModel.from_pretrained(base, "{options.location}").eval(){tokenizer}'
        )

    def adapter_config(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        method = adapter.method
        if not isinstance(method, LoraConfig):
            name = METHODS.name_of(method)
            raise not_expressible("peft", f"method {name!r}", "PEFT has no experts behind routers")
        known = (*field_names(LowRankConfig), "target_modules", "classification")
        known = (*known, "new_tokens", "new_token_id")
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
        new = token_range(method, adapter.model.vocab_size)
        if new is not None:
            ids = list(range(*new))
            is_tied = adapter.model.tie_word_embeddings or method.classification is not None
            modules = ("embed_tokens",) if is_tied else ("embed_tokens", "lm_head")
            config["trainable_token_indices"] = dict.fromkeys(modules, ids)
            if new.stop > adapter.model.vocab_size:
                notes.append(
                    f"resize the base before peft loads the adapter, for the rows of its "
                    f"{new.size} new tokens: base.resize_token_embeddings({new.stop})"
                )
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
        # Without biases in the base none are trained; stored ones are refused with the tensors.
        fields.choose("bias", ("none", "all", "lora_only"), "none")
        fields.ignore(*_IGNORED_FIELDS)
        init = fields.take("init_lora_weights", Any, True)
        if init not in _INITS:
            remedy = MERGE
            if str(init).lower().startswith(_CONVERTIBLE_INITS):
                remedy = (
                    "convert the adapter with peft's "
                    "save_pretrained(path_initial_model_for_weight_conversion=...)"
                )
            raise fields.error(
                "init_lora_weights", f"{init!r} changes the weights of the base; {remedy}"
            )
        init = fields.choose("lora_init", ("original", "gaussian"), init)  # MoE-PEFT's name
        _refuse_more_than_pairs(fields)
        adapted = adapted_modules(fields, model)
        largest = max(adapted.values(), key=lambda size: size.rank)
        dora = fields.take("use_dora", bool, False)
        if dora and not any("lora_magnitude_vector" in name for name in source.tensors):
            raise fields.error(
                "use_dora",
                f"{source.weights_file.name} has no magnitudes, which MoE-PEFT does not save; to "
                f"read it as a LoRA, as MoE-PEFT itself does, set use_dora to false",
            )
        return LoraConfig(
            rank=largest.rank,
            alpha=largest.alpha,
            dropout=read_dropout(fields, 0.0),
            init="gaussian" if init == "gaussian" else "kaiming",
            rslora=fields.take("use_rslora", bool, False),
            dora=dora,
            target_modules=_target_modules(fields, adapted, model),
        )

    def read_leaves(
        self, fields: ConfigFields, source: AdapterFolder, method: AdapterMethod, base: BaseModel
    ) -> dict[str, np.ndarray]:
        adapted, low_rank = adapted_modules(fields, base.config), method.low_rank
        pairs = checked_pairs(source, adapted, low_rank, base.config, base.path)
        specs = expected_leaves(base.config, method)
        return leaves_from_pairs(source, pairs, adapted, low_rank, specs, base)


def _refuse_more_than_pairs(fields: ConfigFields) -> None:
    for name, trained, remedy in (
        ("modules_to_save", "weights of whole modules", MERGE),
        ("trainable_token_indices", "rows of the embedding", MERGE),
        ("lora_bias", "biases of the pairs", "train without them"),
    ):
        value = fields.take(name, Any, None)
        if value:
            raise fields.error(
                name, f"{value!r} adds trained {trained}, which are not supported; {remedy}"
            )


def _target_modules(
    fields: ConfigFields, adapted: Mapping[str, PairSize], model: ModelConfig
) -> tuple[str, ...]:
    """Projections with a pair in any layer, in the order of a list in the configuration."""
    targets = dict.fromkeys(
        kernel.path[-2]
        for kernel in kernels(model)
        if any(module in adapted for module in modules_of(kernel))
    )
    listed = fields.take("target_modules", Any)
    names = [] if isinstance(listed, str) else [name.rpartition(".")[2] for name in listed]
    return tuple(sorted(targets, key=lambda name: names.index(name) if name in names else 0))
