"""Cost of one decoder layer with each adapter method, as counted by XLA.

    python benchmarks/layer_cost.py --output benchmarks/layer_cost.md

One layer is compiled without weights, forward and backward to the adapter and to the layer's input,
and its FLOPs are read from the compiled program, without noise. Each method is compared with plain
LoRA with equal trainable parameters, and with the matrix products that it needs (see `algebra`).
`tests/benchmarks/test_layer_cost.py` checks the table.

Needs jax and flax only.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.compiled_flops import compiled_flops
from benchmarks.report import check_output, refuse
from moe_jax.adapters.lora.lora import Lora, LoraConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig
from moe_jax.adapters.mixtures.mola import MolaConfig
from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.rows import divide_rows
from moe_jax.adapters.tree import ATTENTION_MODULES, TARGET_MODULES
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import UserError
from moe_jax.layers.blocked_attention import BLOCK, block_pairs
from moe_jax.layers.frozen import storage_of
from moe_jax.models.decoder import DecoderLayer
from moe_jax.models.layer_inputs import LayerSettings, TokenContext
from moe_jax.models.remat import REMAT_POLICIES


class Shape(NamedTuple):
    """Sizes of a layer, its batch and its adapters.

    Attributes:
      width: hidden size D.
      ffn_width: width F of the FFN.
      heads: number of attention heads.
      rank: rank of each pair.
      experts: number of experts.
      rows: number of rows of the batch.
      length: number of tokens of a row.
      top_k: number of experts of a token.
    """

    width: int
    ffn_width: int
    heads: int
    rank: int
    experts: int
    rows: int
    length: int
    top_k: int = 2


SHAPES = {
    "D 512": Shape(width=512, ffn_width=1376, heads=8, rank=8, experts=8, rows=8, length=128),
    "7B": Shape(width=4096, ffn_width=11008, heads=32, rank=16, experts=8, rows=4, length=512),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EqualSizeLora(LoraConfig):
    """Plain LoRA with another rank on the FFN, for parameters equal to E experts of rank R."""

    ffn_rank: int

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        rank = self.rank if target in ATTENTION_MODULES else self.ffn_rank
        return Lora(dataclasses.replace(self.low_rank, rank=rank), axes)


def _common(shape: Shape) -> dict[str, Any]:
    return {"rank": shape.rank, "alpha": 16.0, "target_modules": TARGET_MODULES}


def _mixlora(shape: Shape, **fields: Any) -> MixLoraConfig:
    return MixLoraConfig(**_common(shape), num_experts=shape.experts, **fields)


def _lora(shape: Shape, attention_experts: int, **fields: Any) -> EqualSizeLora:
    common = _common(shape) | {"rank": attention_experts * shape.rank}
    return EqualSizeLora(**common, ffn_rank=shape.experts * shape.rank, **fields)


METHODS: dict[str, Callable[[Shape], AdapterMethod]] = {
    "LoRA": lambda s: _lora(s, 1),
    "DoRA": lambda s: _lora(s, 1, dora=True),
    "MixLoRA, top-k": lambda s: _mixlora(s, router=TopKRouter(top_k=s.top_k)),
    "MixLoRA, top-p": lambda s: _mixlora(s, router=TopPRouter(top_p=0.8)),
    "MixLoRA, switch": lambda s: _mixlora(s, router=SwitchRouter(capacity_factor=1.25)),
    "MixLoRA, soft": lambda s: _mixlora(s, router=SoftRouter()),
    "MixDoRA, top-k": lambda s: _mixlora(s, router=TopKRouter(top_k=s.top_k), dora=True),
    "MixDoRA, top-p": lambda s: _mixlora(s, router=TopPRouter(top_p=0.8), dora=True),
    "LoRAMoE": lambda s: LoraMoeConfig(**_common(s), num_experts=s.experts),
    "MoLA": lambda s: MolaConfig(**_common(s), num_experts=(s.experts,)),
}


LAYERS = 2
"""Number of layers in the compiled loop; all have the same cost."""

AT_ALL_SHAPES = ("LoRA", "MixLoRA, top-k", "MixLoRA, top-p", "MixDoRA, top-k", "LoRAMoE")
"""Methods that are also compiled at the large shape; the others add no information there."""


def peer_of(name: str, shape: Shape) -> AdapterMethod:
    """Plain LoRA with equal trainable parameters, except for routers and magnitudes."""
    return _lora(shape, shape.experts if name == "MoLA" else 1)


class LayerCost(NamedTuple):
    """Cost of one layer, forward and backward.

    Attributes:
      flops: FLOPs of the compiled program.
      moved: bytes that its operations read and write.
      temporary: bytes of temporaries, of `LAYERS` layers.
      trainable: number of weights of the adapter.
    """

    flops: float
    moved: float
    temporary: int
    trainable: int


def layer_cost(
    method: AdapterMethod | None,
    shape: Shape,
    remat: str = "none",
) -> LayerCost:
    """Compiles one layer with an adapter method, or frozen, and counts its cost.

    Args:
      method: adapter method; None for the frozen layer.
      shape: sizes of the layer and its batch.
      remat: policy of rematerialization, see `ComputeConfig.remat`.
    """
    step, arguments = layer_step(method, shape, remat)
    compiled = jax.jit(step).lower(*arguments).compile()
    analysis: Any = compiled.memory_analysis()
    flops = compiled_flops(compiled)
    assert not flops.unknown_loops
    return LayerCost(
        flops=flops.total / LAYERS,
        moved=flops.moved / LAYERS,
        temporary=analysis.temp_size_in_bytes,
        trainable=sum(leaf.size for leaf in jax.tree.leaves(arguments[0])),
    )


def layer_step(
    method: AdapterMethod | None, shape: Shape, remat: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Builds a loop of `LAYERS` layers, forward and backward to the adapter and to the input.

    Args:
      method: adapter method; None for the frozen layer.
      shape: sizes of the layer and its batch.
      remat: policy of rematerialization, see `ComputeConfig.remat`.

    Returns:
      The function, and the shapes of its arguments: the adapter's weights, the frozen weights, the
      input of the first layer, the cotangent of the last output, the rotary table, the mask and the
      index of the layer.
    """
    config = ModelConfig(
        vocab_size=64,
        hidden_size=shape.width,
        intermediate_size=shape.ffn_width,
        num_layers=1,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        hidden_act="silu",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=RopeConfig(rope_type="default", rope_theta=10000.0),
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    adapter_rows = () if method is None else divide_rows({"a": method}, {"a": shape.rows})
    settings: Any = {"dtype": "float32", "remat": remat}
    compute, storage = ComputeConfig(**settings), storage_of("float32")
    layer = DecoderLayer(LayerSettings(config, compute, storage, adapter_rows, deterministic=True))
    tokens = (shape.rows, shape.length)
    x = jax.ShapeDtypeStruct((*tokens, shape.width), jnp.float32)
    table = jax.ShapeDtypeStruct((*tokens, config.head_dim), jnp.float32)
    mask = jax.ShapeDtypeStruct(tokens, jnp.bool)
    index = jax.ShapeDtypeStruct((), jnp.int32)

    def inputs(table: jax.Array, mask: jax.Array, index: jax.Array) -> tuple[Any, ...]:
        return TokenContext(table, table, None, mask, None), index

    def init(key: jax.Array, x: jax.Array, *rest: jax.Array) -> Any:
        variables = layer.init({"params": key, "adapters": key}, x, *inputs(*rest))
        return nn.meta.unbox(variables)

    variables = jax.eval_shape(init, jax.random.key(0), x, table, mask, index)

    def step(adapters: Any, params: Any, x: jax.Array, cotangent: jax.Array, *rest: Any) -> Any:
        def loss(adapters: Any, x: jax.Array) -> jax.Array:
            def apply_layer(x: jax.Array, _: None) -> tuple[jax.Array, Any]:
                variables = {"params": params, "adapters": adapters}
                (y, _), sown = layer.apply(variables, x, *inputs(*rest), mutable=["router"])
                return y, sown

            if remat != "none":  # as in `LlamaForCausalLM`
                policy = REMAT_POLICIES[remat]
                apply_layer = jax.checkpoint(apply_layer, policy=policy, prevent_cse=False)
            # In a loop, as in the model: XLA would merge the recomputation of a single layer with
            # its forward pass.
            y, sown = jax.lax.scan(apply_layer, x, length=LAYERS)
            return jnp.sum(y * cotangent) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(sown))

        # With the value, since the gradient does not need the last product.
        return jax.value_and_grad(loss, argnums=(0, 1))(adapters, x)

    return step, (variables.get("adapters", {}), variables["params"], x, x, table, mask, index)


def algebra(name: str, shape: Shape) -> float:
    """FLOPs of the matrix products that a method needs, 2 for each multiply-add.

    A product with a frozen weight is computed twice, forward and for the gradient of its input. A
    product with a trained weight is computed three times, also for the weight's gradient. Per
    token, with widths D and F, joint rank G = E R of all experts, C slots and rows of S tokens:

        frozen      2 (4 D D + 3 D F), and 6 S D for attention; for rows longer than a block of
                    attention, 7 D for each key in the query's block or an earlier one
        pair (r)    3 r (in + out) for each projection
        MixLoRA     gate and up: 3 G (D + C F); down: 3 G (C F + D); router: 3 D E. The products
                    with B of gate and up and with A of down are computed for each slot.
        top-p,      Slot c is expert c, and its products use only its pair, so that C F becomes F:
        soft        LoRA of rank G and the router. Hidden activations are recomputed instead of
                    kept for E experts: 2 G F.
        DoRA        per step, forward only: r D F for the norms' thin product of each projection,
                    and terms of rank size. Gains of experts add 2 C E out per token for each
                    projection with one-hot slots.
        MixDoRA     Gains scale each expert's output of the down projection, so that the products
                    with W_down and with B of down are computed for each slot: 2 (C - 1) D F more
                    for W_down. With top-p, C = E.
        LoRAMoE,    pairs of rank G, and a router on the input of each projection with experts,
        MoLA        3 in E
    """
    width, ffn_width, rank, experts = shape.width, shape.ffn_width, shape.rank, shape.experts
    tokens, joint = shape.rows * shape.length, shape.experts * shape.rank
    attention, ffn = [(width, width)] * 4, [(width, ffn_width)] * 2 + [(ffn_width, width)]
    per_token = 2.0 * sum(i * o for i, o in attention + ffn) + _scores(shape.length) * width
    per_step = 0.0

    def pairs(rank: int, projections: list[tuple[int, int]]) -> float:
        return sum(3.0 * rank * (i + o) for i, o in projections)

    def norms(rank: int, projections: list[tuple[int, int]], pair_rank: int) -> float:
        # The cross term, and A'A and (A'A) B for each pair.
        return sum(rank * (i * o + pair_rank * (i + o)) for i, o in projections)

    if name in ("LoRA", "DoRA"):
        per_token += pairs(rank, attention) + pairs(joint, ffn)
        if name == "DoRA":
            per_step += norms(rank, attention, rank) + norms(joint, ffn, joint)
    elif name in ("LoRAMoE", "MoLA"):
        mixed = ffn if name == "LoRAMoE" else attention + ffn
        per_token += pairs(joint, mixed) + sum(3.0 * i * experts for i, _ in mixed)
        per_token += pairs(rank, attention) if name == "LoRAMoE" else 0.0
    else:
        dora, router = name.startswith("MixDoRA"), name.partition(", ")[2]
        slots = {"top-k": shape.top_k, "switch": 1}.get(router, experts)
        one_hot = router in ("top-k", "switch")
        repeats = slots if one_hot else 1
        per_token += pairs(rank, attention) + 3.0 * width * experts
        per_token += 3.0 * joint * (2 * width + 3 * repeats * ffn_width + width)
        per_token += 0.0 if one_hot else 2.0 * joint * ffn_width
        if dora:
            per_step += norms(rank, attention, rank) + norms(joint, ffn, rank)
            per_token += 2.0 * (slots - 1) * width * ffn_width
            if one_hot:
                per_token += 3.0 * (slots - 1) * joint * width
                per_token += 2.0 * slots * experts * (2 * ffn_width + width)
    return 2.0 * (tokens * per_token + per_step)


def _scores(length: int) -> float:
    """Number of keys multiplied with a query, summed over all products of attention."""
    if length <= BLOCK:
        return 6.0 * length
    count = -(-length // BLOCK)
    size = -(-length // count)
    return 7.0 * len(block_pairs(count, size, None)) * size * size / length


def table_rows() -> list[dict[str, Any]]:
    """Computes the figures of all methods at all shapes."""
    rows = []
    for label, shape in SHAPES.items():
        frozen = layer_cost(None, shape).flops
        peers: dict[AdapterMethod, LayerCost] = {}
        for name, make in METHODS.items():
            if label != "D 512" and name not in AT_ALL_SHAPES:
                continue
            baseline = peer_of(name, shape)
            if baseline not in peers:
                peers[baseline] = layer_cost(baseline, shape)
            cost = peers[baseline] if name == "LoRA" else layer_cost(make(shape), shape)
            peer = peers[baseline]
            rows.append(
                {
                    "shape": label,
                    "method": name,
                    "trainable": cost.trainable / peer.trainable,
                    "of_lora": cost.flops / peer.flops,
                    "of_frozen": cost.flops / frozen,
                    "of_algebra": cost.flops / algebra(name, shape),
                }
            )
    return rows


COLUMNS = ("trainable", "of_lora", "of_frozen", "of_algebra")
HEADER = "| shape | method | weights / LoRA's | FLOPs / LoRA's | / frozen | / algebra |"


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Formats the table as Markdown."""
    shapes = [
        f"- {label}: {', '.join(f'{k} {v}' for k, v in shape._asdict().items())}"
        for label, shape in SHAPES.items()
    ]
    lines = [
        "# Compiled operations of one layer, forward and backward",
        "",
        "Written by `python benchmarks/layer_cost.py --output benchmarks/layer_cost.md` and",
        "checked by a test. LoRA has equal trainable parameters; `algebra` in `layer_cost.py`",
        "has the FLOPs of each method's matrix products. In float32, as counted by XLA for a CPU:",
        "",
        *shapes,
        "",
        HEADER,
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        figures = " | ".join(f"{row[column]:.3f}" for column in COLUMNS)
        lines.append(f"| {row['shape']} | {row['method']} | {figures} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
    except UserError as error:
        return refuse(error)
    text = as_markdown(table_rows())
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
