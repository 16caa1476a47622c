"""Costs of the forms of `growth.py` by number of experts and rank, as rows of its tables.

Needs jax and flax only.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.grouped_mixlora import group_mixlora
from benchmarks.layer_cost import METHODS, SHAPES, LayerCost, Shape, algebra, layer_cost
from moe_jax.config.model import ComputeConfig

SHAPE = SHAPES["7B"]
EXPERTS = (8, 16, 32, 64)
RANKS = (8, 16, 32, 64)
PER_EXPERT_SETTINGS = (*((8, rank) for rank in RANKS), *((experts, 16) for experts in EXPERTS[1:]))
"""Experts and ranks of the per-expert form."""

GROUPED_SETTINGS = (
    *((8, rank) for rank in RANKS),
    *((experts, 16) for experts in (16, 32, 64, 128, 512)),
    (64, 64),
)
"""Experts and ranks of the grouped form."""

LORA, TOP_K, SOFT = "LoRA", "MixLoRA, top-k", "MixLoRA, soft"
DEFAULT = ComputeConfig(dtype="float32").remat
SHARES = (0.05, 0.10, 0.25)


class Growth(NamedTuple):
    """Row of the first table: cost of the one-hot form at one number of experts and rank.

    Attributes:
      experts: number of experts.
      rank: rank of each expert.
      flops_none: ratio of FLOPs to LoRA with equal parameters, with `remat` `none`.
      flops: ratio of FLOPs to LoRA with equal parameters, with the default `remat`.
      of_frozen: ratio of FLOPs to the frozen layer, with `remat` `none`.
      of_grouped: ratio of FLOPs to the grouped form, with `remat` `none`.
      of_algebra: ratio of FLOPs to the algebra, with `remat` `none`.
      moved: ratio of bytes moved to LoRA, with the default `remat`.
      memory_none: ratio of temporary bytes of two layers to LoRA, with `remat` `none`.
      memory: ratio of temporary bytes of two layers to LoRA, with the default `remat`.
    """

    experts: int
    rank: int
    flops_none: float
    flops: float
    of_frozen: float
    of_grouped: float
    of_algebra: float
    moved: float
    memory_none: float
    memory: float


class PerExpert(NamedTuple):
    """Row of the second table: ratios of the per-expert form to the one-hot form, both by default.

    Attributes:
      experts: number of experts.
      rank: rank of each expert.
      flops: ratio of FLOPs.
      moved: ratio of bytes moved.
      memory: ratio of temporary bytes of two layers.
      flops_for_byte: FLOPs saved for each additional byte moved.
    """

    experts: int
    rank: int
    flops: float
    moved: float
    memory: float
    flops_for_byte: float


class GroupedCost(NamedTuple):
    """Row of the fourth table: cost of the implemented grouped form, by default.

    Attributes:
      experts: number of experts.
      rank: rank of each expert.
      flops: ratio of FLOPs to LoRA with equal parameters.
      least: ratio of FLOPs to the algebra of the grouped products.
      one_hot: ratio of the one-hot form's FLOPs to the grouped form's.
      memory: ratio of temporary bytes of two layers to the one-hot form.
      batched: the same ratio if all blocks are computed at once.
    """

    experts: int
    rank: int
    flops: float
    least: float
    one_hot: float
    memory: float
    batched: float


def shape_of(experts: int, rank: int) -> Shape:
    """Shape of the 7B layer with this number of experts and rank."""
    return SHAPE._replace(experts=experts, rank=rank)


@functools.cache
def cost(name: str | None, shape: Shape, remat: str = "none") -> LayerCost:
    """Cost of the method `name` of `layer_cost.METHODS`, or of the frozen layer for None."""
    return layer_cost(None if name is None else METHODS[name](shape), shape, remat)


def growth_of(experts: int, rank: int) -> Growth:
    """Computes a row of the first table, rounded."""
    shape = shape_of(experts, rank)
    kept, lora_kept = cost(TOP_K, shape), cost(LORA, shape)
    default, lora = cost(TOP_K, shape, DEFAULT), cost(LORA, shape, DEFAULT)
    ratios = (
        kept.flops / lora_kept.flops,
        default.flops / lora.flops,
        kept.flops / cost(None, SHAPE).flops,
        kept.flops / grouped_flops(shape),
        kept.flops / algebra(TOP_K, shape),
        default.moved / lora.moved,
        kept.temporary / lora_kept.temporary,
        default.temporary / lora.temporary,
    )
    return Growth(experts, rank, *(round(ratio, 3) for ratio in ratios))


def per_expert_of(experts: int, rank: int) -> PerExpert:
    """Computes a row of the second table, rounded."""
    shape = shape_of(experts, rank)
    soft, one_hot = cost(SOFT, shape, DEFAULT), cost(TOP_K, shape, DEFAULT)
    saved, more = one_hot.flops - soft.flops, soft.moved - one_hot.moved
    return PerExpert(
        experts,
        rank,
        flops=round(soft.flops / one_hot.flops, 3),
        moved=round(soft.moved / one_hot.moved, 3),
        memory=round(soft.temporary / one_hot.temporary, 3),
        flops_for_byte=round(saved / more, 2),
    )


def grouped_of(experts: int, rank: int) -> GroupedCost:
    """Computes a row of the fourth table, rounded."""
    shape = shape_of(experts, rank)
    method = METHODS[TOP_K](shape)
    one_hot = cost(TOP_K, shape, DEFAULT)
    loop, batched = (
        layer_cost(group_mixlora(method, walk), shape, DEFAULT) for walk in ("loop", "batch")
    )
    ratios = (
        loop.flops / cost(LORA, shape, DEFAULT).flops,
        loop.flops / grouped_algebra(shape),
        one_hot.flops / loop.flops,
        loop.temporary / one_hot.temporary,
        batched.temporary / one_hot.temporary,
    )
    return GroupedCost(experts, rank, *(round(ratio, 3) for ratio in ratios))


def _router(shape: Shape) -> float:
    """FLOPs of the router's product: forward, and the gradients of its input and weights."""
    return 2.0 * shape.rows * shape.length * 3.0 * shape.width * shape.experts


def grouped_flops(shape: Shape) -> float:
    """FLOPs of the grouped form, as XLA counts C experts that serve every token.

    Sorting and moving tokens is not counted.
    """
    chosen = shape._replace(experts=shape.top_k)
    return cost(SOFT, chosen).flops + _router(shape) - _router(chosen)


def one_hot_algebra(shape: Shape) -> float:
    """FLOPs of the products of the one-hot form."""
    return algebra(TOP_K, shape)


def grouped_algebra(shape: Shape) -> float:
    """FLOPs of the products of the grouped form: C pairs of rank R per token, and the router."""
    return algebra(LORA, shape._replace(experts=shape.top_k)) + _router(shape)


def half_grouped_algebra(shape: Shape) -> float:
    """FLOPs of a form that groups only the products with R by F matrices.

    The products with the D by E R matrices (A of gate and up, B of down) are computed for all
    experts, so that low-rank activations are moved to and from the groups instead of inputs.
    """
    tokens, others = shape.rows * shape.length, shape.experts - shape.top_k
    return grouped_algebra(shape) + 2.0 * tokens * 9.0 * others * shape.rank * shape.width


def experts_at(share: float, rank: int, form: Callable[[Shape], float]) -> float:
    """Number of experts at which a form needs `share` more FLOPs than the grouped form."""
    few, many = EXPERTS[0], EXPERTS[-1]
    excess = [
        form(shape) - (1.0 + share) * grouped_algebra(shape)
        for shape in (shape_of(few, rank), shape_of(many, rank))
    ]
    return few - excess[0] * (many - few) / (excess[1] - excess[0])


def compiled_experts_at(share: float, rows: Sequence[Growth]) -> float | None:
    """The same number for the compiled one-hot form, interpolated; None outside the rows."""
    for few, many in itertools.pairwise(rows):
        if few.of_grouped <= 1.0 + share <= many.of_grouped:
            part = (1.0 + share - few.of_grouped) / (many.of_grouped - few.of_grouped)
            return few.experts + part * (many.experts - few.experts)
    return None
