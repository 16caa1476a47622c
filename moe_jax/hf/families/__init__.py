"""Model families: one file each, with the reader of its `config.json` and its key table.

Importing this package registers the families in it.
"""

import moe_jax.hf.families.cohere2 as _cohere2  # noqa: F401
import moe_jax.hf.families.exaone4 as _exaone4  # noqa: F401
import moe_jax.hf.families.gemma as _gemma  # noqa: F401
import moe_jax.hf.families.gemma2 as _gemma2  # noqa: F401
import moe_jax.hf.families.gemma3 as _gemma3  # noqa: F401
import moe_jax.hf.families.gemma4 as _gemma4  # noqa: F401
import moe_jax.hf.families.glm as _glm  # noqa: F401
import moe_jax.hf.families.granite as _granite  # noqa: F401
import moe_jax.hf.families.hunyuan as _hunyuan  # noqa: F401
import moe_jax.hf.families.llama as _llama  # noqa: F401
import moe_jax.hf.families.ministral3 as _ministral3  # noqa: F401
import moe_jax.hf.families.mistral as _mistral  # noqa: F401
import moe_jax.hf.families.olmo as _olmo  # noqa: F401
import moe_jax.hf.families.phi3 as _phi3  # noqa: F401
import moe_jax.hf.families.qwen as _qwen  # noqa: F401
import moe_jax.hf.families.qwen3_5 as _qwen3_5  # noqa: F401
import moe_jax.hf.families.seed_oss as _seed_oss  # noqa: F401
import moe_jax.hf.families.smollm3 as _smollm3  # noqa: F401
from moe_jax.hf.families.family import FAMILIES as FAMILIES
from moe_jax.hf.families.family import Family as Family
from moe_jax.hf.families.family import model_family as model_family
