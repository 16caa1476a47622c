"""Formats that adapters are exported to and imported from, one file a format.

    peft       peft.py       LoRA, rsLoRA and DoRA in the folder of PEFT; export and import
    mixlora    moe_peft.py   MixLoRA, LoRAMoE, MoLA and LoRA in the folder of MoE-PEFT; both ways
    mixtral    mixtral.py    MixLoRA and its base as one Mixtral or Qwen3-MoE checkpoint; export
    llama      dense.py      an adapter merged into its base, as one checkpoint; export
    moe_jax    native.py     any adapter in the format of moe_jax, with a model card; export

To add a format:

1. Write one file in this folder with a class that implements `Format`, or one of its two frames:
   `AdapterFormat` (an adapter alone, in PEFT's folder) or `whole_model.ModelFormat` (base and
   adapter as one checkpoint). Decorate it with `@FORMATS.register("NAME")`. `native.py` is the
   shortest example.
2. Import the class below, which registers it for `moe_jax.export_adapter`.
3. Describe it in one line of `EXPORT_FORMATS` in `moe_jax/commands/arguments.py`, for `--help`.

`api.py` holds the entry points `export_adapter` and `import_adapter`.
"""

from moe_jax.exchange.dense import DenseFormat as DenseFormat
from moe_jax.exchange.format import FORMATS as FORMATS
from moe_jax.exchange.mixtral import MixtralFormat as MixtralFormat
from moe_jax.exchange.moe_peft import MoePeftFormat as MoePeftFormat
from moe_jax.exchange.native import NativeFormat as NativeFormat
from moe_jax.exchange.peft import PeftFormat as PeftFormat
