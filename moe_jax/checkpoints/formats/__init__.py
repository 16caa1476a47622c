"""Formats of other tools, one a file; importing this package enters all of them in `FORMATS`."""

from moe_jax.checkpoints.formats.format import FORMATS as FORMATS
from moe_jax.checkpoints.formats.mixlora import MixLoraFormat as MixLoraFormat
from moe_jax.checkpoints.formats.peft import PeftFormat as PeftFormat
