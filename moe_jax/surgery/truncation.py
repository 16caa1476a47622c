"""The nearest pair of rank R to a matrix, or to a sum of pairs.

By the Eckart-Young theorem the first R terms of the singular value decomposition are the nearest
matrix of rank R in the Frobenius norm, and the remaining singular values give the error. All
computations are in float64.
"""

from typing import NamedTuple

import numpy as np

_RELATIVE_TOLERANCE = 1e-7
"""Singular values below this share of the largest are rounding errors of float32 weights."""


class NearestPair(NamedTuple):
    """The nearest pair to a matrix, and its error.

    Attributes:
      lora_a: [in, R], float32.
      lora_b: [R, out], float32; `lora_a @ lora_b` is the nearest matrix of rank R.
      square: squared norm of the given matrix.
      lost: squared norm of the error.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    square: float
    lost: float


def relative_error(parts: list[NearestPair]) -> float:
    """Norm of the errors of several matrices, relative to the norm of the matrices."""
    square = sum(part.square for part in parts)
    return (sum(part.lost for part in parts) / square) ** 0.5 if square > 0.0 else 0.0


def nearest_pair(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> NearestPair:
    """The pair of rank R nearest to a matrix [in, out].

    The singular vectors of the shorter side are eigenvectors of the matrix times its transpose;
    those of the other side follow by a product. Only the first R are computed. The error is
    accurate to 1e-8 of the matrix's norm.

    Args:
      matrix: [in, out].
      rank: R; may exceed the rank of the matrix, see `_pair`.
      rng: generator of A's columns beyond the rank of the matrix.
    """
    matrix = matrix.astype(np.float64)
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    _, vectors = np.linalg.eigh(wide @ wide.T)
    vectors = vectors[:, ::-1][:, :rank]
    others = vectors.T @ wide
    sizes = np.linalg.norm(others, axis=1)
    square = float(np.sum(np.square(matrix)))
    lost = max(square - float(np.sum(np.square(sizes))), 0.0)
    others = others / np.maximum(sizes, np.finfo(float).tiny)[:, None]
    left, right = (others.T, vectors.T) if tall else (vectors, others)
    return _pair(left, sizes, right, rank, square, lost, rng)


def nearest_pair_of_product(
    left: np.ndarray, right: np.ndarray, rank: int, rng: np.random.Generator
) -> NearestPair:
    """The pair of rank R nearest to `left @ right`, without computing that product.

    Args:
      left: [in, n].
      right: [n, out].
      rank: R.
      rng: generator of A's columns beyond the rank of the product.
    """
    basis_in, first = np.linalg.qr(left.astype(np.float64))
    basis_out, second = np.linalg.qr(right.T.astype(np.float64))
    u, sizes, vt = np.linalg.svd(first @ second.T, full_matrices=False)
    square, lost = float(np.sum(np.square(sizes))), float(np.sum(np.square(sizes[rank:])))
    u, sizes, vt = u[:, :rank], sizes[:rank], vt[:rank]
    return _pair(basis_in @ u, sizes, vt @ basis_out.T, rank, square, lost, rng)


def _pair(
    left: np.ndarray,
    sizes: np.ndarray,
    right: np.ndarray,
    rank: int,
    square: float,
    lost: float,
    rng: np.random.Generator,
) -> NearestPair:
    """A pair from singular vectors, each side scaled by the roots of the singular values.

    With fewer than R nonzero singular values, the remaining columns of A are random, as in a new
    LoRA, and the rows of B are zero. If both were zero, neither would ever get a gradient.
    """
    bound = left.shape[0] ** -0.5
    lora_a = rng.uniform(-bound, bound, (left.shape[0], rank))
    lora_b = np.zeros((rank, right.shape[1]))
    largest = max(sizes.max(initial=0.0), np.finfo(float).tiny)
    used = int(np.sum(sizes > _RELATIVE_TOLERANCE * largest))
    roots = np.sqrt(sizes[:used])
    lora_a[:, :used] = left[:, :used] * roots
    lora_b[:used] = right[:used] * roots[:, None]
    return NearestPair(lora_a.astype(np.float32), lora_b.astype(np.float32), square, lost)
