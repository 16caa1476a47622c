"""The language model: embedding, scanned decoder layers, final norm, and the heads on top."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.new_tokens import NewTokens, embedded, extended_logits, new_logits
from moe_jax.adapters.rows import (
    AdapterRows,
    Windows,
    divide_rows,
    replace_rows,
    take_rows_of_adapters,
)
from moe_jax.adapters.score_head import ScoreHeads, is_classifier
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.activation import scaled
from moe_jax.layers.attention import positions_from_segments
from moe_jax.layers.block_cache import BlockPosition
from moe_jax.layers.frozen import storage_of
from moe_jax.layers.kv_cache import CachePosition
from moe_jax.layers.names import ADAPTERS, PARAMS
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import query_scales, rotary_tables
from moe_jax.layers.target_scores import target_scores
from moe_jax.layers.vocab_loss import NewLogits, token_losses
from moe_jax.layers.vocabulary import LanguageModelHead, TokenEmbedding, logits
from moe_jax.models.decoder import DecoderLayer
from moe_jax.models.layer_embedding import LayerEmbeddings
from moe_jax.models.layer_inputs import LayerSettings, TokenContext
from moe_jax.models.mixed_layers import STACKED, MixedLayers, layer_of
from moe_jax.models.remat import REMAT_POLICIES
from moe_jax.sharding.axes import LAYERS


class LlamaForCausalLM(nn.Module):
    """A Llama-style decoder-only language model, with adapters on the rows of its batch.

    The layers are stacked along a leading axis, so that program size is independent of depth.
    Attributes are static and arguments of methods are arrays. `hidden_states` runs the layers;
    `logits`, `token_losses`, `target_scores` and `scores` are the heads on its result.
    Calling the module gives the logits of all positions.

    Attributes:
      config: the architecture; its fields decide which features the program contains.
      compute: dtypes, attention kernel, rematerialization.
      adapter_rows: rows of each adapter; empty for the base model.
      param_dtype: storage of the base parameters, a `StorageType`.
      deterministic: turns dropout and router jitter off.
      cache_length: positions of the cache that `hidden_states` fills; None fills none.
      scan_layers: scan the layers. If false, each layer has variables of its own; see
        `moe_jax.models.layer_views`.

    Raises `ConfigError` when it is applied, if `compute` cannot compute the architecture.

    Collections: `params` (frozen), `adapters` (trainable), `router` and `routing` (sown: ask for
    them with `mutable=["router"]`), `cache` and `cache_updates` (decoding, see
    `moe_jax.layers.kv_cache`). Random stream during training: `dropout`.
    """

    config: ModelConfig
    compute: ComputeConfig
    adapter_rows: tuple[AdapterRows, ...] = ()
    param_dtype: str = "float32"
    deterministic: bool = True
    cache_length: int | None = None
    scan_layers: bool = True

    def setup(self) -> None:
        self.compute.check_model(self.config)
        config, dtype = self.config, jnp.dtype(self.compute.dtype)
        storage = storage_of(self.param_dtype)
        self.embed_tokens = TokenEmbedding(
            config.vocab_size,
            config.hidden_size,
            dtype,
            storage.dtype,
            scale=config.hidden_size**0.5
            if config.scale_embeddings
            else config.embedding_multiplier,
        )
        settings = LayerSettings(
            config,
            self.compute,
            storage,
            self.adapter_rows,
            self.deterministic,
            self.cache_length,
        )
        self.layers: Any
        if not self.scan_layers:
            self.layers = [layer_of(settings, layer) for layer in range(config.num_layers)]
        elif config.has_equal_layers:
            self.layers = self._scanned_layer_class()(settings)
        else:
            self.layers = MixedLayers(settings)
        if config.has_layer_embeddings:
            self.layer_embeddings = LayerEmbeddings(settings)
        self.norm = RMSNorm(
            config.rms_norm_eps,
            dtype,
            storage.dtype,
            config.norm_unit_offset,
            config.norm_centered,
        )
        if not config.tie_word_embeddings:
            self.lm_head = LanguageModelHead(config.vocab_size, config.hidden_size, storage.dtype)
        self.score = ScoreHeads(self.adapter_rows)
        self.new_tokens = NewTokens(self.adapter_rows, config.vocab_size)

    def __call__(self, tokens: jax.Array, **inputs: Any) -> jax.Array:
        """Logits of the next token at every position; see `logits` and `hidden_states`."""
        return self.logits(self.hidden_states(tokens, **inputs))

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_mask: jax.Array | None = None,
        expert_groups: jax.Array | None = None,
        cache_position: CachePosition | BlockPosition | None = None,
        windows: Windows | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, S, D].

        Args:
          tokens: int [B, S].
          positions: int [B, S]; by default each token's position in its sequence.
          segment_ids: int [B, S], 0 at padding (see `Batch`). None if every row is one sequence
            from its first position on; padding on the right may follow if `token_mask` marks it,
            since causality hides it.
          token_mask: bool [B, S], false for tokens that do not count in router statistics; by
            default where `segment_ids` is 0.
          expert_groups: int [B, S], see `Batch`; read by the loss `localized_balance`.
          cache_position: position of these tokens after those in the cache, which then must be
            among the variables; give `positions` too. All tokens are real: `segment_ids` is not
            read. After a `BlockPosition`, `token_mask` marks padding on the right.
          windows: windows of all adapters, where `adapter_rows` have their sizes only.
        """
        num_rows = sum(rows.total for rows in self.adapter_rows)
        if self.adapter_rows and windows is None and num_rows != tokens.shape[0]:
            raise ValueError(f"a batch of {tokens.shape[0]} rows for adapters of {num_rows} rows")
        if positions is None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            positions = positions_from_segments(segments)
        if token_mask is None:
            token_mask = jnp.ones_like(tokens, bool) if segment_ids is None else segment_ids != 0
        cos, sin = self._rotary_tables(self.config.local_layers, positions)
        context = TokenContext(
            cos,
            sin,
            segment_ids,
            token_mask,
            expert_groups,
            cache_position,
            query_scales(self.config.rope, positions),
            windows,
        )
        if self.config.global_attention is not None:
            tables = self._rotary_tables(self.config.global_layers, positions)
            context = context._replace(global_tables=tables)
        x = self._embedded(tokens, windows)
        if self.config.has_layer_embeddings:
            context = context._replace(layer_embeddings=self.layer_embeddings(tokens, x))
        if self.scan_layers:
            x, _ = self.layers(x, context, jnp.arange(self.config.num_layers))
        else:
            for index, layer in enumerate(self.layers):
                x, kept = layer(x, context, jnp.int32(index))
                if kept is not None:
                    name = self.config.attention_module(index)
                    context = context._replace(kept={**(context.kept or {}), name: kept})
        return self.norm(x)

    def logits(self, hidden: jax.Array, windows: Windows | None = None) -> jax.Array:
        """Logits of the next token, float32 [B, ..., V], of hidden states [B, ..., D].

        New tokens of adapters are among them, see `new_tokens.extended_logits`.

        Args:
          hidden: hidden states.
          windows: as in `hidden_states`.
        """
        kernel, tied = self._head()
        hidden = self._head_input(hidden)
        result = logits(hidden, kernel, tied=tied, cap=self.config.final_logit_softcapping)
        extend = self._logits_extension(windows)
        return result if extend is None else extend(hidden, result)

    def token_losses(self, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Cross-entropy of each target in nats, float32 [B, S], without materializing all logits.

        Gradients reach `hidden` and the rows of new tokens only: the base is frozen.

        Args:
          hidden: [B, S, D], all of `language_model_rows`.
          targets: int [B, S], the token that each position is to predict.
        """
        kernel, tied = self._head()
        hidden = self._head_input(hidden)
        cap = self.config.final_logit_softcapping
        return token_losses(
            hidden, kernel, targets, tied=tied, cap=cap, new=self._new_logits(hidden)
        )

    def target_scores(
        self, hidden: jax.Array, places: jax.Array, targets: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of targets at some positions, without materializing all logits.

        Args:
          hidden: [B, S, D].
          places, targets, counts: see `moe_jax.layers.target_scores`, which has the result too.
        """
        kernel, tied = self._head()
        return target_scores(
            self._head_input(hidden),
            kernel,
            places,
            targets,
            counts,
            tied=tied,
            cap=self.config.final_logit_softcapping,
            extend=self._logits_extension(),
        )

    def scores(self, hidden: jax.Array, token_mask: jax.Array) -> dict[str, jax.Array]:
        """Scores float32 [b, N] of the rows of each classification adapter, by name.

        Args:
          hidden: [B, S, D].
          token_mask: bool [B, S], false at padding.
        """
        return self.score(hidden, token_mask)

    def language_model_rows(self, array: jax.Array) -> jax.Array | None:
        """The rows of `array` [B, ...] of adapters without a score head; None if there are none."""
        others = [rows for rows in self.adapter_rows if not is_classifier(rows.method)]
        if len(others) == len(self.adapter_rows):
            return array
        return take_rows_of_adapters(others, array) if others else None

    def _embedded(self, tokens: jax.Array, windows: Windows | None) -> jax.Array:
        """Embeddings [B, S, D] of tokens [B, S]."""
        new = self.new_tokens.new
        if new is None:
            return self.embed_tokens(tokens)
        new_rows = self._new_rows()
        return embedded(tokens, self.embed_tokens, self.adapter_rows, new, new_rows, windows)

    def _new_rows(self) -> Any:
        """Rows of the new tokens, by adapter."""
        kernel = None if self.config.tie_word_embeddings else self.lm_head.kernel
        return self.new_tokens(self.embed_tokens.embedding, kernel)

    def _logits_extension(
        self, windows: Windows | None = None
    ) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
        """Function that adds logits of new tokens, of hidden states and the base's logits."""
        new, cap = self.new_tokens.new, self.config.final_logit_softcapping
        if new is None:
            return None
        new_rows = self._new_rows()

        def extended(hidden: jax.Array, result: jax.Array) -> jax.Array:
            of_new_tokens = new_logits(hidden, self.adapter_rows, new_rows, cap, windows)
            return extended_logits(result, self.adapter_rows, new, of_new_tokens, windows)

        return extended

    def _new_logits(self, hidden: jax.Array) -> NewLogits | None:
        """Logits of the new tokens for the hidden states of `language_model_rows`."""
        new = self.new_tokens.new
        others = [rows for rows in self.adapter_rows if not is_classifier(rows.method)]
        if new is None or not others:
            return None
        methods = {rows.name: rows.method for rows in others}
        totals = {rows.name: rows.total for rows in others}
        divided = divide_rows(methods, totals, others[0].shards)
        cap = self.config.final_logit_softcapping
        found = new_logits(hidden, divided, self._new_rows(), cap)
        if len(found) < len(others):
            raise ValueError("all adapters of a batch that trains must have the same new tokens")
        shape = (*hidden.shape[:-1], new.size)
        return NewLogits(new.first, replace_rows(divided, jnp.zeros(shape), found))

    def _head(self) -> tuple[jax.Array, bool]:
        """The kernel of the language-model head, and whether it is the embedding's [V, D]."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding, True
        return self.lm_head.kernel, False

    def _head_input(self, hidden: jax.Array) -> jax.Array:
        """Hidden states whose product with the kernel has the scale of the logits."""
        scale = self.config.logit_scale
        return hidden if scale is None else scaled(hidden, scale)

    def _rotary_tables(
        self, config: ModelConfig, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The `cos` and `sin` of `TokenContext`, of layers that see this architecture."""
        shape = (config.head_dim, config.max_position_embeddings)
        cos, sin = rotary_tables(config.rope, *shape, positions)
        if config.sliding_rope is None:
            return cos, sin
        local_cos, local_sin = rotary_tables(config.sliding_rope, *shape, positions)
        return jnp.stack([cos, local_cos]), jnp.stack([sin, local_sin])

    def _scanned_layer_class(self) -> Any:
        """`DecoderLayer` with rematerialization, scanned over the layers."""
        layer = DecoderLayer
        if self.compute.remat != "none":
            policy = REMAT_POLICIES[self.compute.remat]
            # Inside a scan XLA cannot merge the recomputation with the forward pass anyway.
            layer = nn.remat(layer, policy=policy, prevent_cse=False)
        # The context is the same for all layers, each index is one layer's. Linen types `in_axes`
        # as if all axes were integers.
        in_axes: Any = (nn.broadcast, 0)
        return nn.scan(
            layer,
            variable_axes=dict.fromkeys(STACKED, 0),
            split_rngs={PARAMS: True, ADAPTERS: True, "dropout": True},
            in_axes=in_axes,
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
