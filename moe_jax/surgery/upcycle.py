"""Converts a LoRA to a mixture of experts that start as its copies.

This is sparse upcycling (arXiv:2212.05055) of an adapter. Each expert gets the LoRA's pair, and the
routers are initialized randomly. The mixture is equal to the LoRA if the weights of a token's
experts sum to one, whichever are chosen. Training then makes the experts differ.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.routing.router import ROUTERS, Router
from moe_jax.adapters.tree import MLP_MODULES, MOE, TARGET_MODULES
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import FieldError, located, parse_member, suggest
from moe_jax.errors import CheckpointError
from moe_jax.surgery.experts import (
    ROUTER_KERNEL,
    ExpertMethod,
    Leaves,
    adapter_leaves,
    expert_counts,
)
from moe_jax.surgery.outcome import (
    SurgeryOutcome,
    changed_adapter,
    open_adapter,
    read_text,
    save_outcome,
)

UPCYCLED = ("mixlora", "loramoe", "mola")
"""Methods that a LoRA can be converted to."""


def upcycle(
    adapter: SavedAdapter | str | Path,
    to: str = "mixlora",
    *,
    num_experts: int | tuple[int, ...],
    router: Router | dict[str, Any] | None = None,
    seed: int = 0,
    data: str | Path | None = None,
    base: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Converts a LoRA, rsLoRA or DoRA to experts.

    MixLoRA and LoRAMoE have experts on the FFN's projections and keep the LoRA's pairs on
    attention. MoLA has experts on all projections. Rank, alpha, dropout and kind stay the same.

    Args:
      adapter: a LoRA, or its folder or hub id.
      to: the method, one of `UPCYCLED`.
      num_experts: E; for MoLA also one number for each of several equal groups of layers.
      router: the routing strategy, or its fields with its `name`; None is the method's default.
      seed: seed of the routers' initialization.
      data: a text file to measure on; required if the result is not exact.
      base: folder or hub id of the base, used for measuring; by default the path that the LoRA
        was trained with.
      output: a folder for the adapter; does not exist, or is empty.

    Raises:
      UserError: the adapter is not a LoRA, the method or router is invalid, or `output` is not
        empty.
    """
    saved = open_adapter(adapter, output)
    method = _method(saved.method, to, num_experts, router)
    with located(f"the new {to}"):
        method.check_model(saved.model)
    inexact = inexactness_reason(method, saved.model)
    needed = f"{inexact}, so the change has to be measured" if inexact else ""
    text = read_text(saved, data, base, needed)
    result = changed_adapter(saved, method, _leaves(saved, method, seed))
    if inexact is None:
        notes = ["exact: the weights of a token's experts, all copies of the LoRA, sum to one"]
    else:
        notes = [f"not exact: {inexact}"]
    change = None
    if text is not None:
        change = text.measurement(saved).logit_change_to(result)
        notes.append(text.describe(change, "the LoRA"))
    return save_outcome(SurgeryOutcome(result, inexact is None, notes, change), output)


def inexactness_reason(method: ExpertMethod, model: ModelConfig) -> str | None:
    """Reason why the weights of a token's experts do not sum to one; None if they do."""
    router = method.router
    name = ROUTERS.name_of(router)
    if isinstance(router, TopKRouter | SoftRouter):
        return None
    if isinstance(router, TopPRouter):
        if router.renormalise or router.top_p == 1.0:
            return None
        return "the weights of 'top_p' without renormalise sum to less than one"
    if not isinstance(router, SwitchRouter):
        return f"the weights of router {name!r} may not sum to one"
    if router.weights == "probability":
        return "'switch' multiplies its expert by a probability; use weights 'straight_through'"
    if router.sparse_step > 1:
        return f"with sparse_step {router.sparse_step} some FFNs do not get the LoRA"
    experts = int(expert_counts(method, model.num_layers).max())
    capacity, factor = router.capacity or 0, router.capacity_factor or 0.0
    if capacity >= model.max_position_embeddings or factor >= experts:
        return None
    return (
        "tokens beyond an expert's capacity do not get the LoRA; capacity_factor "
        f"{float(experts)} avoids this"
    )


def _method(
    lora: Any, to: str, num_experts: int | tuple[int, ...], router: Router | dict[str, Any] | None
) -> ExpertMethod:
    if not isinstance(lora, LoraConfig):
        raise CheckpointError(
            f"method {METHODS.name_of(lora)!r}: only a LoRA can be upcycled; to add experts to a "
            "mixture, use grow"
        )
    if to not in UPCYCLED:
        raise FieldError("to", f"{to!r} is not a method with experts; {suggest(to, UPCYCLED)}")
    number: Any = num_experts
    if to == "mola":
        number = number if isinstance(number, tuple) else (number,)
    elif isinstance(number, tuple):
        if len(number) != 1:
            raise FieldError("num_experts", f"{to!r} takes one number for all layers")
        (number,) = number
    fields: dict[str, Any] = {"name": to, "num_experts": number}
    fields |= {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
    if router is not None:
        fields["router"] = router
    return parse_member(METHODS, fields, f"the new {to}")


def _leaves(saved: SavedAdapter, method: ExpertMethod, seed: int) -> Leaves:
    """Leaves of the new adapter: copied pairs and random routers."""
    counts = expert_counts(method, saved.model.num_layers)
    present = np.arange(counts.max()) < counts[:, None]  # [L, E]
    routes_ffn = isinstance(method, MixLoraConfig)
    rng = np.random.default_rng(seed)
    leaves: Leaves = {}
    for path, leaf in adapter_leaves(saved).items():
        *parents, target, name = path.split("/")
        with_experts = TARGET_MODULES if isinstance(method, MolaConfig) else MLP_MODULES
        if target not in with_experts:
            leaves[path] = leaf
            continue
        # MixLoRA has one router for the FFN, with the input of gate and up.
        site = "/".join([*parents, MOE if routes_ffn else target])
        new = f"{site}/{target}/{name}" if routes_ffn else f"{site}/{name}"
        if name == "lora_A":  # [L, in, R]
            leaves[new] = leaf[:, :, None] * present[:, None, :, None]
            width = saved.model.hidden_size if routes_ffn else leaf.shape[1]
            router = f"{site}/{ROUTER_KERNEL}"
            if router not in leaves:
                kernel = rng.standard_normal((len(counts), width, present.shape[1]))
                leaves[router] = method.router.init_std * kernel * present[:, None]
        elif name == "lora_B":  # [L, R, out]
            leaves[new] = leaf[:, None] * present[:, :, None, None]
        else:  # DoRA's magnitude, [L, out]; absent experts have it too
            leaves[new] = np.repeat(leaf[:, None], present.shape[1], axis=1)
    return leaves
