"""The `adapter_config.json` of MoE-PEFT as one of our methods.

The settings are those that compute what MoE-PEFT computes, its peculiarities included: kept top-p
weights are not renormalised, and a token that a switch expert has no place for yields the FFN's
input, scaled. What a file leaves out means MoE-PEFT's default, `moe_peft/adapters/*/config.py`; it
leaves out most of what matters for training only.
"""

from typing import Any

from moe_jax.adapters.aux_losses import LoadBalance, RouterLoss, RouterZ
from moe_jax.adapters.loramoe import LoraMoeConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.mixlora import ExpertLoraConfig, MixLoraConfig
from moe_jax.adapters.mola import MolaConfig
from moe_jax.adapters.router import Router
from moe_jax.adapters.routers import SwitchRouter, TopKRouter, TopPRouter
from moe_jax.checkpoints.formats.adapter_folder import Fields, read_dropout, read_targets
from moe_jax.config.model import ModelConfig

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
