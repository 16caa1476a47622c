"""A LoRA becomes a mixture of experts that all start as copies of it.

Sparse upcycling (arXiv:2212.05055) of an adapter: each expert gets the LoRA's own pair, and the
routers are fresh. As long as the weights of a token's experts sum to one, what they compute is what
the LoRA computes, whichever are chosen. Training then tells them apart.
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
from moe_jax.surgery.experts import ROUTER, ExpertMethod, Leaves, expert_counts, leaves_of
from moe_jax.surgery.outcome import SurgeryOutcome, changed_adapter, finished, opened, read_text

UPCYCLED = ("mixlora", "loramoe", "mola")
"""The methods that a LoRA can become."""


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
    """Makes experts of a LoRA, rsLoRA or DoRA.

    MixLoRA and LoRAMoE have experts on the FFN's projections and keep the LoRA's pairs on
    attention; MoLA has experts on all of them. Rank, alpha, dropout and kind stay the same.

    Args:
      adapter: a LoRA, or its folder or hub id.
      to: the method, one of `UPCYCLED`.
      num_experts: E; for MoLA also one for each of as many equal groups of layers.
      router: the routing strategy, or its fields with its `name`; None is the method's default.
      seed: of the routers.
      data: a file of text to measure on; needed where the result is not exact.
      base: the base's folder or hub id, where something is measured; by default the path that the
        LoRA was trained with.
      output: where the adapter is written too; does not exist yet, or is empty.

    Raises:
      UserError: the adapter is no LoRA, the method or router does not go with it, or `output` is
        not empty.
    """
    saved = opened(adapter, output)
    method = _method(saved.method, to, num_experts, router)
    with located(f"the new {to}"):
        method.check_model(saved.model)
    doubt = why_not_exact(method, saved.model)
    needed = f"{doubt}, and what that changes has to be measured" if doubt else ""
    text = read_text(saved, data, base, needed)
    result = changed_adapter(saved, method, _leaves(saved, method, seed))
    if doubt is None:
        notes = ["exact: the weights of a token's experts, all copies of the LoRA, sum to one"]
    else:
        notes = [f"not exact: {doubt}"]
    change = None
    if text is not None:
        change = text.measuring(saved).change_to(result)
        notes.append(text.describe(change, "the LoRA"))
    return finished(SurgeryOutcome(result, doubt is None, notes, change), output)


def why_not_exact(method: ExpertMethod, model: ModelConfig) -> str | None:
    """Why the weights of a token's experts do not sum to one; None if they do."""
    router = method.router
    name = ROUTERS.name_of(router)
    if isinstance(router, TopKRouter | SoftRouter):
        return None
    if isinstance(router, TopPRouter):
        if router.renormalise or router.top_p == 1.0:
            return None
        return "the weights of 'top_p' without renormalise sum to less than one"
    if not isinstance(router, SwitchRouter):
        return f"of router {name!r} it is not known that its weights sum to one"
    if router.weights == "probability":
        return "'switch' weights its expert by a probability; 'straight_through' would not"
    if router.sparse_step > 1:
        return f"with sparse_step {router.sparse_step} some FFNs are without the LoRA"
    experts = int(expert_counts(method, model.num_layers).max())
    capacity, factor = router.capacity or 0, router.capacity_factor or 0.0
    if capacity >= model.max_position_embeddings or factor >= experts:
        return None
    return (
        "tokens beyond an expert's capacity do not get the LoRA; with capacity_factor "
        f"{float(experts)} there are none"
    )


def _method(
    lora: Any, to: str, num_experts: int | tuple[int, ...], router: Router | dict[str, Any] | None
) -> ExpertMethod:
    if not isinstance(lora, LoraConfig):
        raise CheckpointError(
            f"method {METHODS.name_of(lora)!r}: only a LoRA can be upcycled; for more experts of "
            "what has some, use grow"
        )
    if to not in UPCYCLED:
        raise FieldError("to", f"{to!r} is no method with experts; {suggest(to, UPCYCLED)}")
    number: Any = num_experts
    if to == "mola":
        number = number if isinstance(number, tuple) else (number,)
    elif isinstance(number, tuple):
        if len(number) != 1:
            raise FieldError("num_experts", f"{to!r} has one number for all layers")
        (number,) = number
    fields: dict[str, Any] = {"name": to, "num_experts": number}
    fields |= {field.name: getattr(lora, field.name) for field in dataclasses.fields(lora)}
    if router is not None:
        fields["router"] = router
    return parse_member(METHODS, fields, f"the new {to}")


def _leaves(saved: SavedAdapter, method: ExpertMethod, seed: int) -> Leaves:
    """The leaves of the new adapter."""
    counts = expert_counts(method, saved.model.num_layers)
    present = np.arange(counts.max()) < counts[:, None]  # [L, E]
    whole = isinstance(method, MixLoraConfig)
    rng = np.random.default_rng(seed)
    leaves: Leaves = {}
    for path, leaf in leaves_of(saved).items():
        *parents, target, name = path.split("/")
        routed = TARGET_MODULES if isinstance(method, MolaConfig) else MLP_MODULES
        if target not in routed:
            leaves[path] = leaf
            continue
        # MixLoRA has one router for the FFN, which sees what gate and up see.
        site = "/".join([*parents, MOE if whole else target])
        new = f"{site}/{target}/{name}" if whole else f"{site}/{name}"
        if name == "lora_A":  # [L, in, R]
            leaves[new] = leaf[:, :, None] * present[:, None, :, None]
            width = saved.model.hidden_size if whole else leaf.shape[1]
            if f"{site}/{ROUTER}" not in leaves:
                drawn = rng.standard_normal((len(counts), width, present.shape[1]))
                leaves[f"{site}/{ROUTER}"] = method.router.init_std * drawn * present[:, None]
        elif name == "lora_B":  # [L, R, out]
            leaves[new] = leaf[:, None] * present[:, :, None, None]
        else:  # DoRA's magnitude, [L, out], which absent experts have too
            leaves[new] = np.repeat(leaf[:, None], present.shape[1], axis=1)
    return leaves
