"""Decoding: many prompts side by side, through different adapters or none, token by token."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.inference.sampling import SamplingConfig


class Request(NamedTuple):
    """A prompt to be continued.

    Attributes:
      tokens: of the prompt; at least one.
      adapter: whose rows it belongs to; None is the base as it is.
      sample: which of several continuations of the same prompt this is.
      index: of the prompt among all that the user gave, over all batches. What is drawn depends on
        the seed, `index`, `sample` and the position, so not on what else is in the batch.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    sample: int = 0
    index: int = 0


class Generator:
    """A base and adapters on it, ready to continue prompts."""

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        adapters: Mapping[str, tuple[AdapterMethod, Any]],
        *,
        compute: ComputeConfig,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        buckets: Sequence[int] | None = None,
    ):
        """Prepares; nothing is compiled yet.

        Args:
          model: the base's architecture.
          params: its weights, on `mesh` if there is one.
          adapters: the method and the weights of each adapter, by name.
          compute: in which type to compute.
          max_length: tokens of a prompt and its continuation together, at most; by default the
            model's context, and never more than it.
          mesh: None computes on the device that holds `params`.
          buckets: ascending lengths that prompts are padded to; by default powers of two.

        Raises:
          ConfigError: the model cannot be computed so, or a length exceeds its context.
        """
        raise NotImplementedError

    def stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        max_new_tokens: int,
        eos_ids: Collection[int],
        seed: int = 0,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continues all requests side by side; everything is checked before the first step.

        Args:
          requests: one for each row.
          sampling: how tokens are chosen.
          max_new_tokens: of each row, at most.
          eos_ids: a row ends with the first of these, which is given too.
          seed: of what is drawn.
          stop: asked after each new token, with the row and all its new tokens; true ends the row.

        Yields:
          The next token of each row, None for rows that have ended. The last yield is the one at
          which the last row ends.

        Raises:
          ConfigError: an unknown adapter, or a number out of range.
          DataError: a prompt is empty, has ids that the model lacks, or is too long for its
            continuation to fit into the context.
        """
        raise NotImplementedError
