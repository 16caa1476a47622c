"""Costs of the forms of `growth.py` by number of experts and rank: the rows of its tables.

Needs jax and flax only.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.grouped_mixlora import in_grouped_form
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
BLOCK = 64
"""Tokens that the one-hot form takes at a time in the backward pass, beside the grouped form, which
takes `rows_of_block` of one expert."""

DEFAULT = ComputeConfig(dtype="float32").remat
SHARES = (0.05, 0.10, 0.25)


class Growth(NamedTuple):
    """The one-hot form at some number of experts and rank; of the first table, a row.

    Attributes:
      flops_none, flops: operations over those of LoRA of as many trainable weights, where
        everything is kept for the backward pass, and by default.
      of_frozen, of_grouped, of_algebra: operations over those of the frozen layer, of the grouped
        form, and over what the algebra needs; where everything is kept.
      moved: bytes moved over LoRA's, by default.
      memory_none, memory: temporary bytes over LoRA's, of two layers.
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
    """The per-expert form over the one-hot one, both by default; of the second table, a row.

    Attributes:
      flops, moved, memory: the ratios.
      flops_for_byte: operations that it saves for each byte that it moves more.
    """

    experts: int
    rank: int
    flops: float
    moved: float
    memory: float
    flops_for_byte: float


class GroupedCost(NamedTuple):
    """The grouped form as it is built, by default; of the fourth table, a row.

    Attributes:
      flops: operations of the layer over those of LoRA of as many trainable weights.
      least: over those of the products that C pairs of rank R a token need.
      one_hot: those of the one-hot form over them.
      memory: temporary bytes over the one-hot form's, of two layers.
      batched: the same where all blocks are computed at once.
    """

    experts: int
    rank: int
    flops: float
    least: float
    one_hot: float
    memory: float
    batched: float


def shape_of(experts: int, rank: int) -> Shape:
    return SHAPE._replace(experts=experts, rank=rank)


@functools.cache
def cost(name: str | None, shape: Shape, remat: str = "none") -> LayerCost:
    """Cost of the method `name` of `layer_cost.METHODS`; None is the frozen layer."""
    return layer_cost(None if name is None else METHODS[name](shape), shape, remat)


def growth_of(experts: int, rank: int) -> Growth:
    """A row of the first table, rounded."""
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
    """A row of the second table, rounded."""
    shape = shape_of(experts, rank)
    own, one_hot = cost(SOFT, shape, DEFAULT), cost(TOP_K, shape, DEFAULT)
    saved, more = one_hot.flops - own.flops, own.moved - one_hot.moved
    return PerExpert(
        experts,
        rank,
        flops=round(own.flops / one_hot.flops, 3),
        moved=round(own.moved / one_hot.moved, 3),
        memory=round(own.temporary / one_hot.temporary, 3),
        flops_for_byte=round(saved / more, 2),
    )


def grouped_of(experts: int, rank: int) -> GroupedCost:
    """A row of the fourth table, rounded."""
    shape = shape_of(experts, rank)
    method = METHODS[TOP_K](shape)
    one_hot = layer_cost(method, shape, DEFAULT, BLOCK)
    loop, batched = (
        layer_cost(in_grouped_form(method, walk), shape, DEFAULT) for walk in ("loop", "batch")
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
    """Operations of the router's product: forward, and for the gradients of input and weights."""
    return 2.0 * shape.rows * shape.length * 3.0 * shape.width * shape.experts


def grouped_flops(shape: Shape) -> float:
    """Operations of the grouped form as XLA counts them, of C experts that serve every token.

    Finding the groups, and moving tokens there and back, is not among them.
    """
    chosen = shape._replace(experts=shape.top_k)
    return cost(SOFT, chosen).flops + _router(shape) - _router(chosen)


def one_hot_algebra(shape: Shape) -> float:
    """Operations of the products that the one-hot form needs."""
    return algebra(TOP_K, shape)


def grouped_algebra(shape: Shape) -> float:
    """Those of the grouped form: C pairs of rank R a token, and the router of E experts."""
    return algebra(LORA, shape._replace(experts=shape.top_k)) + _router(shape)


def half_grouped_algebra(shape: Shape) -> float:
    """Those of a form that groups only the products with matrices as wide as the FFN, R by F.

    The low-rank activations of gate and up, [D, E R], and down's expansion, [E R, D], are of all
    experts at once, so that what goes to the groups and comes from them is rank-sized on one side
    of each projection.
    """
    tokens, others = shape.rows * shape.length, shape.experts - shape.top_k
    return grouped_algebra(shape) + 2.0 * tokens * 9.0 * others * shape.rank * shape.width


def experts_at(share: float, rank: int, form: Callable[[Shape], float]) -> float:
    """Number of experts at which a form needs `share` more than the grouped one."""
    few, many = EXPERTS[0], EXPERTS[-1]
    excess = [
        form(shape) - (1.0 + share) * grouped_algebra(shape)
        for shape in (shape_of(few, rank), shape_of(many, rank))
    ]
    return few - excess[0] * (many - few) / (excess[1] - excess[0])


def compiled_experts_at(share: float, rows: Sequence[Growth]) -> float | None:
    """The same of the one-hot form as compiled, between rows; None where it is not between any."""
    for few, many in itertools.pairwise(rows):
        if few.of_grouped <= 1.0 + share <= many.of_grouped:
            part = (1.0 + share - few.of_grouped) / (many.of_grouped - few.of_grouped)
            return few.experts + part * (many.experts - few.experts)
    return None
