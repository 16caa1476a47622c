"""The whole language model: embedding, scanned decoder layers, norm and head."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.rows import Segment, take_rows_of
from moe_jax.adapters.score_head import Predictions, ScoreHeads, classifying
from moe_jax.adapters.tree import SCORE
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.config.parse import located
from moe_jax.layers.attention import positions_from_segments
from moe_jax.layers.frozen import check_storage, storage_of
from moe_jax.layers.kv_cache import CachePlace
from moe_jax.layers.names import (
    ADAPTERS,
    CACHE,
    CACHE_UPDATES,
    PARAMS,
    ROUTER,
    ROUTING,
)
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import rotary_tables
from moe_jax.layers.vocab_loss import token_losses
from moe_jax.layers.vocabulary import LanguageModelHead, TokenEmbedding, logits
from moe_jax.models.decoder import DecoderLayer, LayerSettings, TokenContext
from moe_jax.models.remat import REMAT_POLICIES
from moe_jax.sharding.axes import LAYERS

_STACKED = (PARAMS, ADAPTERS, ROUTER, ROUTING, CACHE, CACHE_UPDATES)
"""The collections with a leading axis of layers."""


class LlamaForCausalLM(nn.Module):
    """A decoder of Llama's kind, whose layers are stacked along a leading axis, so that program
    size is independent of depth.

    Attributes:
      config: the architecture; what it says of a feature decides whether the program has it.
      compute: types, attention kernel, rematerialisation.
      segments: which rows of a batch belong to which adapter; none is the base model.
      param_dtype: how the base parameters are kept, a `StorageType`.

    Collections: `params` (frozen), `adapters` (trainable), `router` and `routing` (sown; ask for
    them with `mutable=["router"]`), `cache` and `cache_updates` (decoding; see
    `moe_jax.layers.kv_cache`). Random streams while training: `dropout`.
    """

    config: ModelConfig
    compute: ComputeConfig
    segments: tuple[Segment, ...] = ()
    param_dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        expert_groups: jax.Array | None = None,
        deterministic: bool = True,
        cache_length: int | None = None,
        place: CachePlace | None = None,
        last_only: bool = False,
        targets: jax.Array | None = None,
    ) -> jax.Array | Predictions:
        """Logits for the next token, or the losses of given ones; of classification adapters,
        scores.

        Args:
          tokens: int [B, S].
          positions: int [B, S]; by default each token's place within its segment or row.
          segment_ids: int [B, S], 0 at padding (see `Batch`). None means that every row is one
            sequence from its first position on; padding on the right may follow, if `token_mask`
            says where, since causality hides it.
          token_mask: bool [B, S], false where a token must not count in router statistics; by
            default where `segment_ids` is not 0.
          expert_groups: int [B, S], see `Batch`; only losses that know the kinds of data read it.
          deterministic: no dropout and no jitter.
          cache_length: slots of the cache that this call fills; None fills none.
          place: where these tokens stand behind those in the cache, which then must be among the
            variables; give `positions` too. All tokens are real: `segment_ids` is not read.
          last_only: computes the logits of the last position only.
          targets: int [B, S], the token that each position is to predict. With them there are no
            logits, but each target's cross-entropy; the base is not differentiable then.

        Returns:
          float32 [B, S, V], or [B, 1, V], or with targets [B, S]; with segments of classification
          adapters, `Predictions`.

        Raises:
          ConfigError: `compute` cannot compute this architecture.
        """
        rows = sum(segment.rows for segment in self.segments)
        if self.segments and rows != tokens.shape[0]:
            raise ValueError(f"a batch of {tokens.shape[0]} rows for segments of {rows}")
        config, dtype = self.config, jnp.dtype(self.compute.dtype)
        with located("config.compute"):
            self.compute.check_model(config)
        storage = storage_of(self.param_dtype)
        with located("config.base"):
            check_storage(storage, config)
        param_dtype = storage.dtype
        if positions is None:
            ones = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            positions = positions_from_segments(ones)
        if token_mask is None:
            token_mask = jnp.ones_like(tokens, bool) if segment_ids is None else segment_ids != 0

        embed = TokenEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype,
            param_dtype,
            scale=config.hidden_size**0.5 if config.scale_embeddings else None,
            name="embed_tokens",
        )
        x = embed(tokens)
        cos, sin = self._rotary_tables(positions)
        context = TokenContext(cos, sin, segment_ids, token_mask, expert_groups, place)
        settings = LayerSettings(
            config, self.compute, storage, self.segments, deterministic, cache_length
        )
        layer_indices = jnp.arange(config.num_layers)
        x, _ = self._stack()(settings, name="layers")(x, context, layer_indices)
        norm = RMSNorm(
            config.rms_norm_eps, dtype, param_dtype, config.norm_unit_offset, name="norm"
        )
        x = norm(x)
        classifiers = classifying(self.segments)
        scores = {}
        if classifiers:
            scores = ScoreHeads(self.segments, name=SCORE)(x, token_mask)
            others = [segment for segment in self.segments if segment not in classifiers]
            if not others:
                return Predictions(None, scores)
            x = take_rows_of(others, x)
            targets = None if targets is None else take_rows_of(others, targets)
        tied, cap = config.tie_word_embeddings, config.final_logit_softcapping
        if tied:
            kernel = embed.embedding
        else:
            sizes = (config.vocab_size, config.hidden_size)
            kernel = LanguageModelHead(*sizes, param_dtype, name="lm_head").kernel
        if targets is not None:
            losses = token_losses(x, kernel, targets, tied=tied, cap=cap)
            return Predictions(None, scores, losses) if classifiers else losses
        next_token = logits(x[:, -1:] if last_only else x, kernel, tied=tied, cap=cap)
        return Predictions(next_token, scores) if classifiers else next_token

    def _rotary_tables(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The `cos` and `sin` of `TokenContext`."""
        config = self.config
        shape = (config.head_dim, config.max_position_embeddings)
        cos, sin = rotary_tables(config.rope, *shape, positions)
        if config.sliding_rope is None:
            return cos, sin
        local_cos, local_sin = rotary_tables(config.sliding_rope, *shape, positions)
        return jnp.stack([cos, local_cos]), jnp.stack([sin, local_sin])

    def _stack(self) -> Any:
        layer = DecoderLayer
        if self.compute.remat != "none":
            policy = REMAT_POLICIES[self.compute.remat]
            # Inside a scan XLA cannot merge the recomputation with the forward pass anyway.
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        # The context is every layer's, each index one layer's; typed as if all axes were integers.
        in_axes: Any = (nn.broadcast, 0)
        return nn.scan(
            layer,
            variable_axes=dict.fromkeys(_STACKED, 0),
            split_rngs={PARAMS: True, ADAPTERS: True, "dropout": True},
            in_axes=in_axes,
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
