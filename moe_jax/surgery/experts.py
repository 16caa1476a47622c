"""Experts in the leaves of an adapter: their sites, counts and rearrangement.

Letters: L layers, E experts. The leaves of every layer have room for the largest number of experts
of any layer. A layer with fewer experts has them in front; the others are absent (see
`moe_jax.adapters.mixtures.mixture`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig
from moe_jax.adapters.mixtures.mixture import layer_group
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.adapters.routing.router import Router
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.parse import located
from moe_jax.errors import CheckpointError

Leaves = dict[str, np.ndarray]

ROUTER_KERNEL = "router/kernel"
EXPERT_AXIS = {"lora_A": 2, "lora_B": 1, "magnitude": 1, "kernel": 2}
"""Expert axis of leaves with a layer axis in front, by the name of the leaf."""

NO_EXPERT = -1
"""Index that stands for an absent expert."""

ExpertMethod = MixLoraConfig | LoraMoeConfig | MolaConfig


def expert_method(adapter: SavedAdapter) -> ExpertMethod:
    """The method of an adapter with experts.

    Raises:
      CheckpointError: the adapter has no experts, or its method is not supported.
    """
    if not isinstance(adapter.method, ExpertMethod):
        known = ", ".join(n for n, cls in METHODS.items() if issubclass(cls, ExpertMethod))
        raise CheckpointError(
            f"method {METHODS.name_of(adapter.method)!r} has no experts that can be changed; give "
            f"an adapter of one of {known}, or convert a LoRA with upcycle"
        )
    return adapter.method


def adapter_leaves(adapter: SavedAdapter) -> Leaves:
    """An adapter's leaves by path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()}


def expert_counts(method: ExpertMethod, num_layers: int) -> np.ndarray:
    """Number of experts of each layer, int [L]."""
    groups = method.num_experts if isinstance(method, MolaConfig) else (method.num_experts,)
    return np.array(groups)[layer_group(np.arange(num_layers), len(groups), num_layers)]


def routed_sites(leaves: Mapping[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """Paths of the leaves of each routed site, by the site's name in `collect_statistics`.

    The leaves of a site are the router's kernel and the pairs of all projections that it serves.
    """
    sites = {}
    for path in leaves:
        if path.endswith(f"/{ROUTER_KERNEL}"):
            stem = path.removesuffix(ROUTER_KERNEL)
            paths = tuple(other for other in leaves if other.startswith(stem))
            sites[stem.removeprefix("layers/").removesuffix("/")] = paths
    return sites


def site_projections(site: str, paths: Sequence[str]) -> dict[str, str]:
    """Projections of a site: their paths without the leaf name, by names as `mlp/gate_proj`."""
    stems = [path.removesuffix("/lora_A") for path in paths if path.endswith("/lora_A")]
    return {stem.removeprefix("layers/").replace(f"{MOE}/", ""): stem for stem in stems}


def expert_low_rank(method: ExpertMethod) -> LowRankConfig:
    """Settings of the experts' pairs."""
    return method.expert_low_rank if isinstance(method, MixLoraConfig) else method.low_rank


def gather_experts(leaves: Leaves, sources: Mapping[str, np.ndarray]) -> Leaves:
    """Leaves whose experts are copies of the given experts.

    Args:
      leaves: leaves of the adapter.
      sources: int [L, E'] for each site, the index of the expert that each new expert copies, or
        `NO_EXPERT`: then its leaves are zero, except DoRA's magnitude, which has no effect.
    """
    result = dict(leaves)
    for site, paths in routed_sites(leaves).items():
        index = sources[site]
        for path in paths:
            name = path.rpartition("/")[2]
            axis = EXPERT_AXIS[name]
            shape = [1] * leaves[path].ndim
            shape[0], shape[axis] = index.shape
            gathered = np.take_along_axis(
                leaves[path], np.maximum(index, 0).reshape(shape), axis=axis
            )
            present = (index != NO_EXPERT).reshape(shape)
            result[path] = gathered if name == "magnitude" else np.where(present, gathered, 0.0)
            result[path] = result[path].astype(leaves[path].dtype)
    return result


def padded_experts(experts: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists of experts, one for each layer, as int [L, E'] padded with `NO_EXPERT`."""
    width = max(len(layer) for layer in experts)
    return np.array([[*layer, *[NO_EXPERT] * (width - len(layer))] for layer in experts])


def with_num_experts(
    method: ExpertMethod, change: Callable[[int], int], router: Router | None = None
) -> ExpertMethod:
    """The method with another number of experts, and optionally another router.

    Args:
      method: method of the former adapter.
      change: computes the new number from the former; MoLA has one for each group of layers.
      router: the new router; None keeps the former.

    Raises:
      ConfigError: the number of experts is invalid for the method.
    """
    router = method.router if router is None else router
    with located("the new method"):
        if isinstance(method, MolaConfig):
            number = tuple(map(change, method.num_experts))
            return dataclasses.replace(method, num_experts=number, router=router)
        return dataclasses.replace(method, num_experts=change(method.num_experts), router=router)
