"""MoE-PEFT (TUDB-Labs) and its `mixlora` package: `adapter_config.json` and `adapter_model.bin`.

After MoE-PEFT 2.0.2 and mixlora 0.2.3. MoE-PEFT reads all that is written here; the package reads
MixLoRA with a top-k router, and takes the experts' rank and scale for those of attention.

Their readers insist on the `.bin`, on `act_fn` (the package fails without), on whole numbers for
`lora_alpha`, floats for coefficients, and a dropout above zero. Both leave dropout on when they
generate, and the package jitter too, so that neither is written as it was in training.
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
from moe_jax.adapters.tree import ATTENTION_MODULES
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.exchange.adapter_folder import (
    NO_DROPOUT,
    TORCH_FILE,
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


# FIXME docstring of the merged exchange.mixlora_reading:
# """The `adapter_config.json` of MoE-PEFT as one of our methods.
#
# The settings are those that compute what MoE-PEFT computes, its peculiarities included: kept top-p
# weights are not renormalised, and a token that a switch expert has no place for yields the FFN's
# input, scaled. What a file leaves out means MoE-PEFT's default, `moe_peft/adapters/*/config.py`; it
# leaves out most of what matters for training only.
# """


_STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")
_AUX_COEFFICIENT, _Z_COEFFICIENT = 0.001, 0.001

# Names of the same function.
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}


def read_method(peft_type: str, fields: Fields, model: ModelConfig) -> AdapterMethod:
    """The method that a configuration describes; see `AdapterFormat.method_of`."""
    # The two kinds of task without a head of their own.
    fields.choose("task_type", ("CAUSAL_LM", "QUESTION_ANS"), None)
    fields.choose("bias", ("none",), "none")
    fields.ignore("base_model_name_or_path", "name", "task_name")
    common = {**_read_pair(fields, {}), "target_modules": read_targets(fields)}
    init = fields.choose("lora_init", ("original", "gaussian"), "original")
    common["init"] = "gaussian" if init == "gaussian" else "kaiming"
    experts = fields.take("num_experts", int)
    if peft_type == "LORAMOE":
        fields.choose("routing_strategy", ("loramoe",), "loramoe")
        fields.ignore("router_init_range")  # of another distribution than ours
        return LoraMoeConfig(**common, num_experts=experts)
    if peft_type == "MOLA":
        fields.choose("routing_strategy", ("mola",), "mola")
        fields.ignore("router_init_range")
        router = TopKRouter(top_k=fields.take("top_k", int, 2))
        losses = _read_losses(fields, default=False, z_loss=False)
        return MolaConfig(**common, num_experts=(experts,), router=router, losses=losses)
    strategy = fields.choose("routing_strategy", _STRATEGIES)
    activation = fields.take("act_fn", str, model.hidden_act)
    if _function(activation) != _function(model.hidden_act):
        raise fields.error(
            "act_fn",
            f"{activation!r} in the experts' FFN is not supported where the base has "
            f"{model.hidden_act!r}; give the base that the adapter was trained on",
        )
    return MixLoraConfig(
        **common,
        num_experts=experts,
        router=_read_router(strategy, fields),
        expert_lora=_read_expert_lora(fields, common),
        ffn_dropout=fields.take("ffn_dropout", float, 0.0),
        losses=_read_losses(fields, default=True, z_loss=strategy == "mixlora-switch"),
    )


def _function(activation: str) -> str:
    return _ACTIVATIONS.get(activation, activation)


def _read_pair(fields: Fields, defaults: dict[str, Any]) -> dict[str, Any]:
    """Rank, alpha, dropout and kind of a pair; without a default the first two are required."""
    if fields.take("use_dora", bool, False):
        raise fields.error(
            "use_dora",
            "MoE-PEFT does not save the magnitudes that it trained; to read the adapter as what "
            "MoE-PEFT itself makes of it, which is no DoRA, set use_dora to false",
        )
    found = {
        "rank": fields.take("r", int, defaults.get("rank")),
        "alpha": fields.take("lora_alpha", float, defaults.get("alpha")),
        "dropout": read_dropout(fields, defaults.get("dropout", 0.0)),
        "rslora": fields.take("use_rslora", bool, defaults.get("rslora", False)),
    }
    for name, value in (("r", found["rank"]), ("lora_alpha", found["alpha"])):
        if value is None:
            raise fields.error(name, "this field is required and was not given")
    return found


def _read_expert_lora(fields: Fields, common: dict[str, Any]) -> ExpertLoraConfig:
    """What differs for the experts."""
    own = fields.part("expert_lora")
    if own is None:
        return ExpertLoraConfig()
    own.choose("bias", ("none",), "none")
    own.ignore("base_model_name_or_path", "task_type", "name", "task_name", "lora_init")
    pair = _read_pair(own, common)
    own.finish()
    return ExpertLoraConfig(**{k: v for k, v in pair.items() if v != common[k]})


def _read_router(strategy: str, fields: Fields) -> Router:
    """The router of a MixLoRA."""
    switch = strategy == "mixlora-switch"
    common = {
        "init_std": fields.take("router_init_range", float, 1.0 if switch else 0.02),
        "jitter_noise": fields.take("jitter_noise", float, 0.01 if switch else 0.0),
    }
    if strategy == "mixlora":
        return TopKRouter(top_k=fields.take("top_k", int, 2), **common)
    if switch:
        fields.ignore("sparse_step")  # which MoE-PEFT writes and never reads
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


def _read_losses(fields: Fields, *, default: bool, z_loss: bool) -> dict[str, RouterLoss]:
    """The auxiliary losses, which MoE-PEFT computes of all layers at once."""
    wanted = fields.take("router_loss", bool, default)
    balance = fields.take("router_aux_loss_coef", float, _AUX_COEFFICIENT)
    z = fields.take("router_z_loss_coef", float, _Z_COEFFICIENT) if z_loss else 0.0
    losses: dict[str, RouterLoss] = {}
    if wanted and balance > 0:
        losses["load_balance"] = LoadBalance(coefficient=balance, scope="pooled")
    if wanted and z > 0:
        losses["router_z"] = RouterZ(coefficient=z, scope="pooled")
    return losses
