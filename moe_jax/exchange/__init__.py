"""Formats of other tools, one a file; importing this package enters all of them in `FORMATS`."""

from moe_jax.exchange.dense import DenseFormat as DenseFormat
from moe_jax.exchange.format import FORMATS as FORMATS
from moe_jax.exchange.mixtral import MixtralFormat as MixtralFormat
from moe_jax.exchange.moe_peft import MixLoraFormat as MixLoraFormat
from moe_jax.exchange.native import OwnFormat as OwnFormat
from moe_jax.exchange.peft import PeftFormat as PeftFormat
