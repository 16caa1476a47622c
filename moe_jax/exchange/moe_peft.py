"""The mixlora format: `adapter_config.json` and `adapter_model.bin` of MoE-PEFT (TUDB-Labs).

Follows MoE-PEFT 2.0.2 and its `mixlora` package 0.2.3. MoE-PEFT reads everything that is written
here. The package reads MixLoRA with a top-k router only, and uses the experts' rank and scale on
attention too.

Both require the `.bin` file, `act_fn` (the package fails without it), an integer `lora_alpha`,
float coefficients, and a dropout above zero. Both apply dropout during generation, and the package
also applies jitter. The file therefore does not contain the training values of dropout and jitter.

Imported settings are those that compute what MoE-PEFT computes, including its deviations: kept
top-p weights are not renormalized, and a token beyond the capacity of a switch expert yields the
FFN's input, scaled. A missing field has MoE-PEFT's default (`moe_peft/adapters/*/config.py`), which
leaves out most fields that matter for training only.
"""

from typing import Any

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS, AdapterMethod
from moe_jax.adapters.mixlora import ExpertLoraConfig, MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.routing.losses import LoadBalance, RouterLoss, RouterZ
from moe_jax.adapters.routing.router import ROUTERS, Router
from moe_jax.adapters.tree import MLP_MODULES
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.exchange.adapter_folder import (
    NO_DROPOUT,
    TORCH_FILE,
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

_FORMAT = "mixlora"

# Fields that this file writes, checks, or leaves out because they matter for training only.
_KNOWN = (
    *field_names(LowRankConfig),
    "target_modules",
    "classification",  # refused for every format without `classifies`
    "new_tokens",  # refused for every format without `adds_tokens`
    "new_token_id",
    "num_experts",
    "router",
    "expert_lora",
    "ffn_dropout",
    "losses",
)
_HANDLED_ROUTER_FIELDS = {
    TopKRouter: ("top_k",),
    TopPRouter: ("top_p", "temperature", "renormalise"),
    SwitchRouter: ("capacity", "capacity_factor", "overflow", "weights", "sparse_step"),
    SoftRouter: (),
}

_STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")

# MoE-PEFT's default coefficient of either auxiliary loss.
_LOSS_COEFFICIENT = 0.001

# Activations that transformers has under two names.
_ACTIVATION_ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}


@FORMATS.register(_FORMAT)
class MoePeftFormat(AdapterFormat):
    """MixLoRA with the routers top_k, top_p and switch, LoRAMoE and MoLA; LoRA for export only."""

    peft_types = ("MIXLORA", "LORAMOE", "MOLA")
    weights_file = TORCH_FILE

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        if _is_readable_by_package(adapter):
            return (
                "from mixlora import MixLoraModelForCausalLM  # pip install mixlora\n\n"
                f'model, _ = MixLoraModelForCausalLM.from_pretrained("{options.location}")\n'
                "model.eval()"
            )
        return (
            "import moe_peft  # MoE-PEFT, https://github.com/TUDB-Labs/MoE-PEFT\n"
            "import torch\n\n"
            "model = moe_peft.LLMModel.from_pretrained(\n"
            f'    "{options.base}", device="cpu", load_dtype=torch.float32\n'
            ")\n"
            f'name = model.load_adapter("{options.location}")'
        )

    def adapter_config(self, adapter: SavedAdapter, base: str) -> tuple[dict[str, Any], list[str]]:
        method, notes = adapter.method, _training_notes(adapter.method)
        require_known(method, _KNOWN, "", _FORMAT)
        if isinstance(method, MixLoraConfig):
            config = _mixlora_fields(method, adapter.model, notes)
        elif isinstance(method, LoraMoeConfig):
            config = _loramoe_fields(method)
        elif isinstance(method, MolaConfig):
            config = _mola_fields(method)
        elif isinstance(method, LoraConfig):
            config = {"peft_type": "LORA", **_low_rank_fields(method.low_rank)}
        else:
            name = METHODS.name_of(method)
            raise not_expressible(_FORMAT, f"method {name!r}", "MoE-PEFT has no such method")
        config |= {"target_modules": list(method.target_modules), "bias": "none"}
        return config | {"task_type": "CAUSAL_LM", "base_model_name_or_path": base}, notes

    def parse_method(
        self, peft_type: str, fields: ConfigFields, source: AdapterFolder, model: ModelConfig
    ) -> AdapterMethod:
        # The task types without a head.
        fields.choose("task_type", ("CAUSAL_LM", "QUESTION_ANS"), None)
        fields.choose("bias", ("none",), "none")
        fields.ignore("base_model_name_or_path", "name", "task_name")
        common = {**_read_low_rank(fields, {}), "target_modules": read_target_modules(fields)}
        init = fields.choose("lora_init", ("original", "gaussian"), "original")
        common["init"] = "gaussian" if init == "gaussian" else "kaiming"
        num_experts = fields.take("num_experts", int)
        if peft_type == "LORAMOE":
            fields.choose("routing_strategy", ("loramoe",), "loramoe")
            fields.ignore("router_init_range")  # of another distribution
            return LoraMoeConfig(**common, num_experts=num_experts)
        if peft_type == "MOLA":
            fields.choose("routing_strategy", ("mola",), "mola")
            fields.ignore("router_init_range")
            router = TopKRouter(top_k=fields.take("top_k", int, 2))
            losses = _read_losses(fields, default=False, z_loss=False)
            return MolaConfig(**common, num_experts=(num_experts,), router=router, losses=losses)
        strategy = fields.choose("routing_strategy", _STRATEGIES)
        _check_activation(fields, model)
        return MixLoraConfig(
            **common,
            num_experts=num_experts,
            router=_read_router(strategy, fields),
            expert_lora=_read_expert_lora(fields, common),
            ffn_dropout=fields.take("ffn_dropout", float, 0.0),
            losses=_read_losses(fields, default=True, z_loss=strategy == "mixlora-switch"),
        )


def _is_readable_by_package(adapter: SavedAdapter) -> bool:
    """True if the `mixlora` package computes the adapter too, not MoE-PEFT alone."""
    method = adapter.method
    return (
        isinstance(method, MixLoraConfig)
        and isinstance(method.router, TopKRouter)
        and (
            method.expert_low_rank == method.low_rank
            or not any(target not in MLP_MODULES for target in method.target_modules)
        )
    )


# Export: a method as fields of `adapter_config.json`.


def _low_rank_fields(pairs: LowRankConfig) -> dict[str, Any]:
    if pairs.dora:
        raise not_expressible(_FORMAT, "DoRA (dora True)", "MoE-PEFT does not save magnitudes")
    if not float(pairs.alpha).is_integer():
        raise not_expressible(
            _FORMAT, f"alpha {pairs.alpha}", "its readers require an integer; train with one"
        )
    return {
        "r": pairs.rank,
        "lora_alpha": int(pairs.alpha),
        "lora_dropout": NO_DROPOUT,
        "use_rslora": pairs.rslora,
        "lora_init": "gaussian" if pairs.init == "gaussian" else "original",
    }


def _mixlora_fields(method: MixLoraConfig, model: ModelConfig, notes: list[str]) -> dict[str, Any]:
    attention = any(target not in MLP_MODULES for target in method.target_modules)
    experts = _low_rank_fields(method.expert_low_rank)
    # Without attention, only experts have pairs.
    common = _low_rank_fields(method.low_rank) if attention else experts
    config = {
        "peft_type": "MIXLORA",
        **common,
        "num_experts": method.num_experts,
        "act_fn": model.hidden_act,
        **_router_fields(method.router, notes),
        "router_init_range": method.router.init_std,
        "jitter_noise": 0.0,
        **_loss_fields(method, z_loss=isinstance(method.router, SwitchRouter)),
    }
    if experts != common:
        config["expert_lora"] = experts
        notes.append("expert_lora is read by MoE-PEFT; the mixlora package 0.2.3 ignores it")
    return config


def _router_fields(router: Router, notes: list[str]) -> dict[str, Any]:
    """Fields of the routing strategy of a MixLoRA."""
    if isinstance(router, TopKRouter):
        _require_router(router)
        return {"routing_strategy": "mixlora", "top_k": router.top_k}
    if isinstance(router, TopPRouter):
        _require_router(router, renormalise=False, temperature=1.0)
        # MoE-PEFT divides probabilities by a temperature; zero turns this off.
        return {"routing_strategy": "mixlora-dynamic", "top_p": router.top_p, "temperature": 0.0}
    if isinstance(router, SwitchRouter):
        _require_router(
            router, capacity_factor=None, overflow="input", weights="probability", sparse_step=1
        )
        notes.append("MoE-PEFT 2.0.2 skips the FFN when it generates with switch")
        return {"routing_strategy": "mixlora-switch", "expert_capacity": router.capacity}
    name = ROUTERS.name_of(router)
    raise not_expressible(
        _FORMAT,
        f"router {name!r} of a MixLoRA",
        "MoE-PEFT has top_k, top_p and switch; train with one of these",
    )


def _loramoe_fields(method: LoraMoeConfig) -> dict[str, Any]:
    if not isinstance(method.router, SoftRouter):
        name = ROUTERS.name_of(method.router)
        reason = "MoE-PEFT has soft only; train with router 'soft'"
        raise not_expressible(_FORMAT, f"router {name!r} of a LoRAMoE", reason)
    _require_router(method.router)
    strategy = {"routing_strategy": "loramoe", "num_experts": method.num_experts}
    return {"peft_type": "LORAMOE", **_low_rank_fields(method.low_rank), **strategy}


def _mola_fields(method: MolaConfig) -> dict[str, Any]:
    if not isinstance(method.router, TopKRouter):
        name = ROUTERS.name_of(method.router)
        reason = "MoE-PEFT has top_k only; train with router 'top_k'"
        raise not_expressible(_FORMAT, f"router {name!r} of a MoLA", reason)
    _require_router(method.router)
    counts = "-".join(map(str, method.num_experts))
    if len(set(method.num_experts)) > 1:
        reason = "MoE-PEFT has one number of experts for all layers; train with one"
        raise not_expressible(_FORMAT, f"num_experts {counts}", reason)
    return {
        "peft_type": "MOLA",
        **_low_rank_fields(method.low_rank),
        "routing_strategy": "mola",
        "num_experts": method.num_experts[0],
        "top_k": method.router.top_k,
        **_loss_fields(method, z_loss=False),
    }


def _require_router(router: Router, **required: Any) -> None:
    """Requires the settings of a router that MoE-PEFT's router has."""
    for field, expected in required.items():
        value = getattr(router, field)
        if value != expected:
            reason = f"MoE-PEFT's router behaves as {expected!r}; train with that"
            raise not_expressible(_FORMAT, f"router.{field} {value!r}", reason)
    known = _HANDLED_ROUTER_FIELDS[type(router)]
    require_known(router, (*known, *field_names(Router)), "router.", _FORMAT)


def _loss_fields(method: MixLoraConfig | MolaConfig, *, z_loss: bool) -> dict[str, Any]:
    """Fields of the auxiliary losses that MoE-PEFT has."""
    coefficients = {name: loss.coefficient for name, loss in method.losses.items()}
    fields: dict[str, Any] = {"router_loss": False}
    fields["router_aux_loss_coef"] = float(coefficients.get("load_balance", 0.0))
    if z_loss:
        fields["router_z_loss_coef"] = float(coefficients.get("router_z", 0.0))
    fields["router_loss"] = any(fields.values())
    return fields


def _training_notes(method: AdapterMethod) -> list[str]:
    """A note on settings that are left out because they matter for training only."""
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
    return [f"left out, relevant for further training only: {', '.join(left_out)}"]


# Import: fields of `adapter_config.json` as a method.


def _check_activation(fields: ConfigFields, model: ModelConfig) -> None:
    """Refuses experts with another activation than the base's FFN."""
    activation = fields.take("act_fn", str, model.hidden_act)
    names = {_ACTIVATION_ALIASES.get(name, name) for name in (activation, model.hidden_act)}
    if len(names) > 1:
        raise fields.error(
            "act_fn",
            f"{activation!r} in the experts' FFN is not supported where the base has "
            f"{model.hidden_act!r}; give the base that the adapter was trained on",
        )


def _read_low_rank(fields: ConfigFields, defaults: dict[str, Any]) -> dict[str, Any]:
    """Rank, alpha, dropout and kind of pairs; rank and alpha are required without a default."""
    if fields.take("use_dora", bool, False):
        raise fields.error(
            "use_dora",
            "MoE-PEFT does not save the magnitudes that it trained; to read the adapter without "
            "DoRA, as MoE-PEFT itself does, set use_dora to false",
        )
    settings = {
        "rank": fields.take("r", int, defaults.get("rank")),
        "alpha": fields.take("lora_alpha", float, defaults.get("alpha")),
        "dropout": read_dropout(fields, defaults.get("dropout", 0.0)),
        "rslora": fields.take("use_rslora", bool, defaults.get("rslora", False)),
    }
    for name, value in (("r", settings["rank"]), ("lora_alpha", settings["alpha"])):
        if value is None:
            raise fields.error(name, "this field is required and was not given")
    return settings


def _read_expert_lora(fields: ConfigFields, common: dict[str, Any]) -> ExpertLoraConfig:
    """Settings of the experts' pairs that differ from those of attention."""
    expert_fields = fields.subgroup("expert_lora")
    if expert_fields is None:
        return ExpertLoraConfig()
    expert_fields.choose("bias", ("none",), "none")
    expert_fields.ignore("base_model_name_or_path", "task_type", "name", "task_name", "lora_init")
    settings = _read_low_rank(expert_fields, common)
    expert_fields.refuse_unread()
    return ExpertLoraConfig(**{k: v for k, v in settings.items() if v != common[k]})


def _read_router(strategy: str, fields: ConfigFields) -> Router:
    """The router of a MixLoRA."""
    switch = strategy == "mixlora-switch"
    common = {
        "init_std": fields.take("router_init_range", float, 1.0 if switch else 0.02),
        "jitter_noise": fields.take("jitter_noise", float, 0.01 if switch else 0.0),
    }
    if strategy == "mixlora":
        return TopKRouter(top_k=fields.take("top_k", int, 2), **common)
    if switch:
        fields.ignore("sparse_step")  # MoE-PEFT writes it but never reads it
        return SwitchRouter(
            capacity=fields.take("expert_capacity", int, 32), overflow="input", **common
        )
    temperature = fields.take("temperature", float, 0.0)
    if temperature not in (0.0, 1.0):
        raise fields.error(
            "temperature",
            f"{temperature} divides probabilities in MoE-PEFT, which is not supported here; only "
            "adapters without it can be read",
        )
    return TopPRouter(top_p=fields.take("top_p", float, 0.8), renormalise=False, **common)


def _read_losses(fields: ConfigFields, *, default: bool, z_loss: bool) -> dict[str, RouterLoss]:
    """The auxiliary losses, which MoE-PEFT pools over all layers."""
    enabled = fields.take("router_loss", bool, default)
    balance = fields.take("router_aux_loss_coef", float, _LOSS_COEFFICIENT)
    z = fields.take("router_z_loss_coef", float, _LOSS_COEFFICIENT) if z_loss else 0.0
    losses: dict[str, RouterLoss] = {}
    if enabled and balance > 0:
        losses["load_balance"] = LoadBalance(coefficient=balance, scope="pooled")
    if enabled and z > 0:
        losses["router_z"] = RouterZ(coefficient=z, scope="pooled")
    return losses
