"""Model families: one file each, with the reader of its `config.json` and its key table.

Importing this package registers the families in it.
"""

import moe_jax.hf.families.gemma as _gemma  # noqa: F401
import moe_jax.hf.families.gemma2 as _gemma2  # noqa: F401
import moe_jax.hf.families.gemma3 as _gemma3  # noqa: F401
import moe_jax.hf.families.glm as _glm  # noqa: F401
import moe_jax.hf.families.llama as _llama  # noqa: F401
import moe_jax.hf.families.mistral as _mistral  # noqa: F401
import moe_jax.hf.families.phi3 as _phi3  # noqa: F401
import moe_jax.hf.families.qwen as _qwen  # noqa: F401
from moe_jax.hf.families.family import FAMILIES as FAMILIES
from moe_jax.hf.families.family import Family as Family
from moe_jax.hf.families.family import model_family as model_family
