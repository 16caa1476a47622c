"""A whole model on rows longer than a block of attention."""

import jax
import jax.numpy as jnp
import numpy as np
from hf_models import tiny_model
from tiny_program import ALL_TARGETS
from tolerances import FLOAT32_LOGITS, GRADIENT_ROUNDING

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.rows import AdapterRows
from moe_jax.adapters.tree import to_collection
from moe_jax.config.model import ComputeConfig
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.layers import attention
from moe_jax.models.adapted import untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

# Two sequences in a row and padding behind them; padding on the left.
SEGMENT_IDS = np.array([[1] * 7 + [2] * 9 + [0] * 5, [0] * 6 + [1] * 15])


def test_blocks_compute_the_same_model(tmp_path, monkeypatch):
    # One layer of the three has no window, and scores are capped.
    tiny_model("gemma2", sliding_window=5).save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.sliding_layers == (True, False, True) and config.attn_logit_softcapping
    params = load_base_params(tmp_path, config, "float32")
    method = LoraConfig(rank=2, alpha=4.0, target_modules=ALL_TARGETS)
    adapter_rows = (AdapterRows("default", method, 0, 2),)
    tokens = np.random.default_rng(0).integers(0, 64, SEGMENT_IDS.shape)

    def model(remat):
        return LlamaForCausalLM(config, ComputeConfig(dtype="float32", remat=remat), adapter_rows)

    fresh = jax.eval_shape(
        lambda key: untrained_adapter(model("none"), method, params, key), jax.random.key(0)
    )
    rng = np.random.default_rng(1)
    tree = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), fresh)

    def run(remat, segment_ids):
        def loss(tree):
            variables = {"params": params, "adapters": to_collection({"default": tree})}
            logits = model(remat).apply(variables, tokens, segment_ids=segment_ids)
            weights = jnp.asarray(SEGMENT_IDS != 0, jnp.float32)[..., None]
            return jnp.mean(weights * jnp.sin(logits)), logits * weights

        (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tree)
        return logits, gradient

    expected, gradient = run("none", SEGMENT_IDS)
    monkeypatch.setattr(attention, "BLOCK", 8)
    found, in_blocks = run("dots", SEGMENT_IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_LOGITS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **GRADIENT_ROUNDING), in_blocks, gradient
    )
