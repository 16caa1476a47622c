"""MoE-PEFT (TUDB-Labs) and its `mixlora` package: `adapter_config.json` and `adapter_model.bin`.

After MoE-PEFT 2.0.2 and mixlora 0.2.3. MoE-PEFT reads all that is written here; the package reads
MixLoRA with a top-k router, and takes the experts' rank and scale for those of attention.

Their readers insist on the `.bin`, on `act_fn` (the package fails without), on whole numbers for
`lora_alpha`, floats for coefficients, and a dropout above zero. Both leave dropout on when they
generate, and the package jitter too, so that neither is written as it was in training.
"""

from typing import Any

from moe_jax.adapters.lora import LoraConfig
from moe_jax.adapters.loramoe import LoraMoeConfig
from moe_jax.adapters.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS, AdapterMethod
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mola import MolaConfig
from moe_jax.adapters.router import ROUTERS, Router
from moe_jax.adapters.routers import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.targets import ATTENTION_MODULES
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.formats.adapter_folder import (
    NO_DROPOUT,
    TORCH_FILE,
    AdapterFolder,
    Fields,
)
from moe_jax.checkpoints.formats.format import (
    FORMATS,
    AdapterFormat,
    ExportOptions,
    cannot,
    field_names,
    require_known,
)
from moe_jax.checkpoints.formats.mixlora_reading import read_method
from moe_jax.config.model import ModelConfig

_FORMAT = "mixlora"

# The fields that this file writes, refuses, or leaves out because they matter for training only.
_KNOWN = (
    *field_names(LowRankConfig),
    "target_modules",
    "classification",  # refused before: see `Format.classifies`
    "num_experts",
    "router",
    "expert_lora",
    "ffn_dropout",
    "losses",
)
_KNOWN_OF_ROUTERS = {
    TopKRouter: ("top_k",),
    TopPRouter: ("top_p", "temperature", "renormalise"),
    SwitchRouter: ("capacity", "capacity_factor", "overflow", "weights", "sparse_step"),
    SoftRouter: (),
}


@FORMATS.register(_FORMAT)
class MixLoraFormat(AdapterFormat):
    """MixLoRA with the routers top_k, top_p and switch; LoRAMoE; MoLA; and plain LoRA to write."""

    reads = ("MIXLORA", "LORAMOE", "MOLA")
    weights_file = TORCH_FILE

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        if _read_by_the_package(adapter):
            return (
                "from mixlora import MixLoraModelForCausalLM  # pip install mixlora\n\n"
                f'model, _ = MixLoraModelForCausalLM.from_pretrained("{options.name}")\n'
                "model.eval()"
            )
        return (
            "import moe_peft  # MoE-PEFT, https://github.com/TUDB-Labs/MoE-PEFT\n"
            "import torch\n\n"
            "model = moe_peft.LLMModel.from_pretrained(\n"
            f'    "{options.base}", device="cpu", load_dtype=torch.float32\n'
            ")\n"
            f'name = model.load_adapter("{options.name}")'
        )

    def config_of(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        method, notes = adapter.method, _training_notes(adapter.method)
        require_known(method, _KNOWN, "", _FORMAT)
        if isinstance(method, MixLoraConfig):
            config = _mixlora(method, adapter.model, notes)
        elif isinstance(method, LoraMoeConfig):
            config = _loramoe(method)
        elif isinstance(method, MolaConfig):
            config = _mola(method)
        elif isinstance(method, LoraConfig):
            config = {"peft_type": "LORA", **_pair(method.low_rank)}
        else:
            name = METHODS.name_of(method)
            raise cannot(_FORMAT, f"method {name!r}", "MoE-PEFT has no such method")
        config |= {"target_modules": list(method.target_modules), "bias": "none"}
        return config | {"task_type": "CAUSAL_LM", "base_model_name_or_path": base}, notes

    def method_of(
        self, peft_type: str, fields: Fields, source: AdapterFolder, model: ModelConfig
    ) -> AdapterMethod:
        return read_method(peft_type, fields, model)


def _read_by_the_package(adapter: SavedAdapter) -> bool:
    """Whether the `mixlora` package computes the adapter too, and not MoE-PEFT alone."""
    method = adapter.method
    return (
        isinstance(method, MixLoraConfig)
        and isinstance(method.router, TopKRouter)
        and (
            method.expert_low_rank == method.low_rank
            or not any(target in ATTENTION_MODULES for target in method.target_modules)
        )
    )


def _pair(pairs: LowRankConfig) -> dict[str, Any]:
    """The fields of one pair."""
    if pairs.dora:
        raise cannot(
            _FORMAT,
            "DoRA (dora True)",
            "MoE-PEFT does not save magnitudes",
        )
    if not float(pairs.alpha).is_integer():
        raise cannot(
            _FORMAT, f"alpha {pairs.alpha}", "its readers take whole numbers only; train with one"
        )
    return {
        "r": pairs.rank,
        "lora_alpha": int(pairs.alpha),
        "lora_dropout": NO_DROPOUT,
        "use_rslora": pairs.rslora,
        "lora_init": "gaussian" if pairs.init == "gaussian" else "original",
    }


def _mixlora(method: MixLoraConfig, model: ModelConfig, notes: list[str]) -> dict[str, Any]:
    attention = any(target in ATTENTION_MODULES for target in method.target_modules)
    experts = _pair(method.expert_low_rank)
    common = _pair(method.low_rank) if attention else experts  # of nothing else, without attention
    config = {
        "peft_type": "MIXLORA",
        **common,
        "num_experts": method.num_experts,
        "act_fn": model.hidden_act,
        **_routing(method.router, notes),
        "router_init_range": method.router.init_std,
        "jitter_noise": 0.0,
        **_losses(method, z_loss=isinstance(method.router, SwitchRouter)),
    }
    if experts != common:
        config["expert_lora"] = experts
        notes.append("expert_lora is read by MoE-PEFT; the mixlora package 0.2.3 ignores it")
    return config


def _routing(router: Router, notes: list[str]) -> dict[str, Any]:
    """The fields of the routing strategy of a MixLoRA."""
    if isinstance(router, TopKRouter):
        _require_router(router)
        return {"routing_strategy": "mixlora", "top_k": router.top_k}
    if isinstance(router, TopPRouter):
        _require_router(router, renormalise=False, temperature=1.0)
        # There, a temperature would divide probabilities; zero leaves them alone.
        return {"routing_strategy": "mixlora-dynamic", "top_p": router.top_p, "temperature": 0.0}
    if isinstance(router, SwitchRouter):
        _require_router(
            router, capacity_factor=None, overflow="input", weights="probability", sparse_step=1
        )
        notes.append("MoE-PEFT 2.0.2 leaves the FFN out altogether when it generates with switch")
        return {"routing_strategy": "mixlora-switch", "expert_capacity": router.capacity}
    name = ROUTERS.name_of(router)
    raise cannot(
        _FORMAT, f"router {name!r} of a MixLoRA", "MoE-PEFT has top_k, top_p and switch; train one"
    )


def _loramoe(method: LoraMoeConfig) -> dict[str, Any]:
    if not isinstance(method.router, SoftRouter):
        name = ROUTERS.name_of(method.router)
        raise cannot(_FORMAT, f"router {name!r} of a LoRAMoE", "MoE-PEFT has soft only; train it")
    _require_router(method.router)
    strategy = {"routing_strategy": "loramoe", "num_experts": method.num_experts}
    return {"peft_type": "LORAMOE", **_pair(method.low_rank), **strategy}


def _mola(method: MolaConfig) -> dict[str, Any]:
    if not isinstance(method.router, TopKRouter):
        name = ROUTERS.name_of(method.router)
        raise cannot(_FORMAT, f"router {name!r} of a MoLA", "MoE-PEFT has top_k only; train it")
    _require_router(method.router)
    counts = "-".join(map(str, method.num_experts))
    if len(set(method.num_experts)) > 1:
        raise cannot(
            _FORMAT,
            f"num_experts {counts}",
            "MoE-PEFT has one number of experts for all layers; train with one",
        )
    return {
        "peft_type": "MOLA",
        **_pair(method.low_rank),
        "routing_strategy": "mola",
        "num_experts": method.num_experts[0],
        "top_k": method.router.top_k,
        **_losses(method, z_loss=False),
    }


def _require_router(router: Router, **needed: Any) -> None:
    """Refuses settings of a router that MoE-PEFT's does not have."""
    for field, value in needed.items():
        found = getattr(router, field)
        if found != value:
            raise cannot(
                _FORMAT,
                f"router.{field} {found!r}",
                f"MoE-PEFT's router does what {value!r} does; train with that",
            )
    known = _KNOWN_OF_ROUTERS[type(router)]
    require_known(router, (*known, *field_names(Router)), "router.", _FORMAT)


def _losses(method: MixLoraConfig | MolaConfig, *, z_loss: bool) -> dict[str, Any]:
    """The fields of the losses that MoE-PEFT has."""
    coefficients = {name: loss.coefficient for name, loss in method.losses.items()}
    fields: dict[str, Any] = {"router_loss": False}
    fields["router_aux_loss_coef"] = float(coefficients.get("load_balance", 0.0))
    if z_loss:
        fields["router_z_loss_coef"] = float(coefficients.get("router_z", 0.0))
    fields["router_loss"] = any(fields.values())
    return fields


def _training_notes(method: AdapterMethod) -> list[str]:
    """What the format leaves out, as it matters for training only."""
    left_out = []
    pairs = [method.low_rank]
    if isinstance(method, MixLoraConfig):
        pairs.append(method.expert_low_rank)
        left_out += ["ffn_dropout"] * (method.ffn_dropout > 0)
    left_out += ["dropout"] * any(pair.dropout > 0 for pair in pairs)
    router = getattr(method, "router", None)
    left_out += ["router.jitter_noise"] * (router is not None and router.jitter_noise > 0)
    written = {"load_balance"} if isinstance(method, MixLoraConfig | MolaConfig) else set()
    written |= {"router_z"} if isinstance(router, SwitchRouter) else set()
    for name, loss in method.router_losses.items():
        if name not in written:
            left_out.append(f"losses.{name}")
        elif loss.scope != "pooled":
            left_out.append(f"losses.{name}.scope")
    if not left_out:
        return []
    return [f"left out, as it matters for further training only: {', '.join(left_out)}"]
