"""Formats of other tools, one a file; importing this package enters all of them in `FORMATS`."""

from moe_jax.checkpoints.formats.dense import DenseFormat as DenseFormat
from moe_jax.checkpoints.formats.format import FORMATS as FORMATS
from moe_jax.checkpoints.formats.mixlora import MixLoraFormat as MixLoraFormat
from moe_jax.checkpoints.formats.mixtral import MixtralFormat as MixtralFormat
from moe_jax.checkpoints.formats.own import OwnFormat as OwnFormat
from moe_jax.checkpoints.formats.peft import PeftFormat as PeftFormat
