"""The one form in which training text reaches the device."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Rows of tokens, padded to a common length; NumPy on the host, jax arrays on the device.

    A row is one sequence, or several where rows are packed.

    All fields have shape [B, S] (B rows of S tokens). The target of position s is the token at
    s + 1.

    Attributes:
      tokens: int32 token ids; the id at a padding position is never read.
      loss_mask: bool, true where the token *at that position* is to be predicted; false at the
        first token of a sequence behind another.
      segment_ids: int32, 0 at padding, otherwise the number of the sequence within its row, from 1.
        Tokens attend within their own segment only.
      positions: int32, the token's place within its own sequence, from 0.
      expert_groups: int32, the group of experts that the token's sequence belongs to, the same
        for all of its tokens, and 0 at padding; see `SourceConfig.expert_group`.
      labels: float32, 0 but at the last token of a row that is to be classified: there the index of
        its class or its number stands, and `loss_mask` is true.
    """

    tokens: Any
    loss_mask: Any
    segment_ids: Any
    positions: Any
    expert_groups: Any
    labels: Any
