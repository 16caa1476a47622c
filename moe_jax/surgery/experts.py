"""Where an adapter has experts, and how they are taken out of its leaves and put back.

Letters: L layers, E experts. All layers have leaves for the largest number of experts of any; in a
layer with fewer, the experts that it has are the first, and the others are absent (see
`moe_jax.adapters.mixtures.mixture`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.adapters.routing.router import Router
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.parse import located
from moe_jax.errors import CheckpointError

Leaves = dict[str, np.ndarray]

ROUTER = "router/kernel"
EXPERT_AXIS = {"lora_A": 2, "lora_B": 1, "magnitude": 1, "kernel": 2}
"""Of each leaf of an expert, and of its router's kernel, with layers in front."""

ABSENT = -1
"""In the place of an expert's index: the layer has no expert there."""

ExpertMethod = MixLoraConfig | LoraMoeConfig | MolaConfig


def expert_method(adapter: SavedAdapter) -> ExpertMethod:
    """The method of an adapter with experts.

    Raises:
      CheckpointError: it has none, or is of a method that these operations know nothing of.
    """
    if not isinstance(adapter.method, ExpertMethod):
        known = ", ".join(n for n, cls in METHODS.items() if issubclass(cls, ExpertMethod))
        raise CheckpointError(
            f"method {METHODS.name_of(adapter.method)!r} has no experts that can be changed; give "
            f"an adapter of one of {known}, or make one of a LoRA with upcycle"
        )
    return adapter.method


def leaves_of(adapter: SavedAdapter) -> Leaves:
    """An adapter's leaves by path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()}


def expert_counts(method: ExpertMethod, num_layers: int) -> np.ndarray:
    """How many experts each layer has, int [L]."""
    groups = method.num_experts if isinstance(method, MolaConfig) else (method.num_experts,)
    return np.array([groups[layer * len(groups) // num_layers] for layer in range(num_layers)])


def sites_of(leaves: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """The routed sites as `collect_statistics` calls them, each with its experts' leaves.

    A site's leaves are those of all the projections that one router serves, and its kernel.
    """
    sites = {}
    for path in leaves:
        if path.endswith(f"/{ROUTER}"):
            stem = path.removesuffix(ROUTER)
            own = tuple(other for other in leaves if other.startswith(stem))
            sites[stem.removeprefix("layers/").removesuffix("/")] = own
    return sites


def projections_of(site: str, paths: Sequence[str]) -> dict[str, str]:
    """The projections of a site, `{"mlp/gate_proj": path without the leaf's name}`."""
    stems = [path.removesuffix("/lora_A") for path in paths if path.endswith("/lora_A")]
    return {stem.removeprefix("layers/").replace(f"{MOE}/", ""): stem for stem in stems}


def expert_low_rank(method: ExpertMethod) -> LowRankConfig:
    """What each expert's pair is."""
    return method.expert_low_rank if isinstance(method, MixLoraConfig) else method.low_rank


def rearranged(leaves: Leaves, sources: Mapping[str, np.ndarray]) -> Leaves:
    """Leaves whose experts are copies of these ones.

    Args:
      leaves: of the adapter.
      sources: for each site, int [L, E'], which of its experts each new one is a copy of, or
        `ABSENT`: then all is zero but DoRA's magnitude, which no token reaches either.
    """
    result = dict(leaves)
    for site, paths in sites_of(leaves).items():
        index = sources[site]
        for path in paths:
            name = path.rpartition("/")[2]
            axis = EXPERT_AXIS[name]
            shape = [1] * leaves[path].ndim
            shape[0], shape[axis] = index.shape
            taken = np.take_along_axis(leaves[path], np.maximum(index, 0).reshape(shape), axis=axis)
            present = (index != ABSENT).reshape(shape)
            result[path] = taken if name == "magnitude" else np.where(present, taken, 0.0)
            result[path] = result[path].astype(leaves[path].dtype)
    return result


def padded(kept: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists of experts, one a layer, as int [L, E'] with `ABSENT` behind the shorter ones."""
    width = max(len(own) for own in kept)
    return np.array([[*own, *[ABSENT] * (width - len(own))] for own in kept])


def with_num_experts(
    method: ExpertMethod, change: Callable[[int], int], router: Router | None = None
) -> ExpertMethod:
    """The method with another number of experts, and perhaps another router.

    Args:
      method: of the former adapter.
      change: makes the new number of an old one; MoLA has one for each group of layers.
      router: None keeps the router.

    Raises:
      ConfigError: the method does not go with so many experts.
    """
    router = method.router if router is None else router
    with located("the new method"):
        if isinstance(method, MolaConfig):
            number = tuple(map(change, method.num_experts))
            return dataclasses.replace(method, num_experts=number, router=router)
        return dataclasses.replace(method, num_experts=change(method.num_experts), router=router)
