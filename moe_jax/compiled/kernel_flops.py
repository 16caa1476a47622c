"""FLOPs of the kernels of a compiled program: matrix products, convolutions and attention."""

import json
import math
import re

from moe_jax.compiled.hlo import Computation, Instruction

_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


def product_sizes(scope: Computation, instruction: Instruction) -> list[int] | None:
    """Batch, rows, columns and contracted size of a matrix product; None for other instructions."""
    attributes = instruction.attributes
    if instruction.opcode == "convolution":
        return _convolution_sizes(scope, instruction)
    if instruction.opcode == "dot":
        pattern = r"\b{}_dims=\{{([^}}]*)\}}"
    elif instruction.opcode == "custom-call" and "gemm_backend_config" in attributes:
        pattern = r'"{}_dimensions":\s*\[([^\]]*)\]'
    else:
        return None
    shapes = [scope[operand].arrays[0].shape for operand in instruction.operands[:2]]

    def size(dimensions: str) -> int:
        """Product of the named dimensions of the first operand."""
        found = re.search(pattern.format(f"lhs_{dimensions}"), attributes)
        indices = re.findall(r"\d+", found[1]) if found else []
        return math.prod(shapes[0][int(index)] for index in indices)

    batch, contracted = size("batch"), size("contracting")
    rows, columns = (math.prod(shape) // (batch * contracted) for shape in shapes)
    return [batch, rows, columns, contracted]


def _convolution_sizes(scope: Computation, instruction: Instruction) -> list[int] | None:
    """See `product_sizes`, of a product in the form that TPUs compute.

    Rows are the convolution's batch, columns its output features, and the contracted size its input
    features. Further dimensions of the product are spatial: those of equal sizes in both operands
    and the result belong to the batch, those of which one of the three has size 1 to the other two.
    """
    labels = _LABELS.search(instruction.attributes)
    if labels is None:
        return None
    arrays = [scope[name].arrays[0] for name in instruction.operands[:2]] + instruction.arrays[:1]
    left, right, result = (
        dict(zip(names, array.shape, strict=True))
        for names, array in zip(labels.groups(), arrays, strict=True)
    )
    batch, rows, columns, contracted = 1, result["b"], result["f"], right["i"]
    for axis in left.keys() - {"b", "f"}:
        sizes = left[axis], right[axis], result[axis]
        if sizes[1] == 1:
            rows *= max(sizes)
        elif sizes[0] == 1:
            columns *= max(sizes)
        elif sizes[2] == 1:
            contracted *= max(sizes)
        else:
            batch *= max(sizes)
    return [batch, rows, columns, contracted]


def attention_flops(scope: Computation, instruction: Instruction) -> float:
    """FLOPs of both products of attention, over the pairs that the mask allows."""
    text = instruction.attributes.partition(", backend_config=")[2]
    config = json.JSONDecoder().raw_decode(text)[0]["cudnn_fmha_backend_config"]
    scores = config["intermediate_tensor_shape"]["dimensions"]
    batch, heads, queries, keys = map(int, scores)
    pairs = float(queries * keys)
    if "CAUSAL" in config.get("mask_type", ""):
        window = int(config.get("sliding_window_length", 0)) or keys
        pairs = queries * window - window**2 / 2
    query = scope[instruction.operands[0]].arrays[0]
    width = math.prod(query.shape) // (batch * heads * queries)
    return 4.0 * batch * heads * width * pairs
