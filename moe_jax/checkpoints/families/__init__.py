"""Model families: for each, how its `config.json` and its tensors' names are read.

Importing this package enters the families that come with it in the registry.
"""

import moe_jax.checkpoints.families.gemma as _gemma  # noqa: F401
import moe_jax.checkpoints.families.gemma2 as _gemma2  # noqa: F401
import moe_jax.checkpoints.families.gemma3 as _gemma3  # noqa: F401
import moe_jax.checkpoints.families.glm as _glm  # noqa: F401
import moe_jax.checkpoints.families.llama as _llama  # noqa: F401
import moe_jax.checkpoints.families.mistral as _mistral  # noqa: F401
import moe_jax.checkpoints.families.phi3 as _phi3  # noqa: F401
import moe_jax.checkpoints.families.qwen as _qwen  # noqa: F401
from moe_jax.checkpoints.families.family import FAMILIES as FAMILIES
from moe_jax.checkpoints.families.family import Family as Family
from moe_jax.checkpoints.families.family import family_of as family_of
from moe_jax.checkpoints.families.family import model_family as model_family
