"""Which experts are nearest to each other, by what they change of the weights."""

from collections.abc import Sequence

import numpy as np


def product_gram(lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """Inner products of the experts' products A B, [E, E], without making any of them.

    `<A_i B_i, A_j B_j> = sum((A_i' A_j) * (B_i B_j'))`.

    Args:
      lora_a: [in, E, R].
      lora_b: [E, R, out].
    """
    inner_a = np.einsum("der,dfs->efrs", lora_a, lora_a, dtype=np.float64)
    inner_b = np.einsum("ero,fso->efrs", lora_b, lora_b, dtype=np.float64)
    return np.sum(inner_a * inner_b, axis=(2, 3))


def similar_groups(gram: np.ndarray, number: int) -> list[list[int]]:
    """Merges the two groups whose means are nearest to each other until `number` are left.

    Args:
      gram: inner products of the experts, [E, E].
      number: at most E.

    Returns:
      The groups, each in rising order, by their first experts.
    """
    groups = [[expert] for expert in range(len(gram))]
    while len(groups) > number:
        inner = np.array([[_mean(gram, a, b) for b in groups] for a in groups])
        square = np.diag(inner)[:, None] + np.diag(inner)[None] - 2.0 * inner
        square[np.tril_indices(len(groups))] = np.inf
        first, second = np.unravel_index(np.argmin(square), square.shape)
        groups[first] = sorted(groups[first] + groups.pop(int(second)))
    return sorted(groups)


def _mean(gram: np.ndarray, first: Sequence[int], second: Sequence[int]) -> float:
    """The inner product of two groups' means."""
    return float(gram[np.ix_(first, second)].mean())
