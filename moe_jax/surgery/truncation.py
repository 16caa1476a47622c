"""The best pair of a rank for a matrix, or for a sum of pairs.

By Eckart and Young the first R terms of the singular value decomposition are the nearest matrix of
rank R in the Frobenius norm, and the error is what the other singular values have. Computed in
float64.
"""

from typing import NamedTuple

import numpy as np

_NOTHING = 1e-7
"""A singular value below this share of the largest is rounding: float32 weights have no more."""


class Truncated(NamedTuple):
    """A pair, and what it leaves out.

    Attributes:
      lora_a: [in, R], float32.
      lora_b: [R, out], float32; `lora_a @ lora_b` is the matrix nearest to the given one.
      square: the given matrix's squared norm.
      lost: that of what is left out.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    square: float
    lost: float


def relative_error(parts: list[Truncated]) -> float:
    """Of several matrices together: the norm of what is left out over the norm of all."""
    square = sum(part.square for part in parts)
    return (sum(part.lost for part in parts) / square) ** 0.5 if square > 0.0 else 0.0


def truncated(matrix: np.ndarray, rank: int, rng: np.random.Generator) -> Truncated:
    """The pair of rank R nearest to a matrix [in, out].

    The singular vectors of the shorter side come from the matrix times its transpose; then the
    other side's are products. Beyond the first R nothing is computed, and the error is accurate to
    1e-8 of the matrix's norm.

    Args:
      matrix: [in, out].
      rank: R; may exceed the matrix's rank, see `_pair`.
      rng: for the directions that the matrix leaves open.
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


def truncated_product(
    left: np.ndarray, right: np.ndarray, rank: int, rng: np.random.Generator
) -> Truncated:
    """The pair of rank R nearest to `left @ right`, which is never made.

    Args:
      left: [in, n].
      right: [n, out].
      rank: R.
      rng: for the directions that the product leaves open.
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
) -> Truncated:
    """A pair of singular vectors, each side with the roots of the singular values.

    Where there are fewer than R that are not zero, A's column is fresh, as a new LoRA's, and B's
    row is zero: two zeros would get no gradient, ever.
    """
    bound = left.shape[0] ** -0.5
    lora_a = rng.uniform(-bound, bound, (left.shape[0], rank))
    lora_b = np.zeros((rank, right.shape[1]))
    used = int(np.sum(sizes > _NOTHING * max(sizes.max(initial=0.0), np.finfo(float).tiny)))
    roots = np.sqrt(sizes[:used])
    lora_a[:, :used] = left[:, :used] * roots
    lora_b[:used] = right[:used] * roots[:, None]
    return Truncated(lora_a.astype(np.float32), lora_b.astype(np.float32), square, lost)
