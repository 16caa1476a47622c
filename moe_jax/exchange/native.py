"""The moe_jax format: an adapter folder of this library with a model card, for publication."""

from pathlib import Path

import jax

from moe_jax.checkpoints.adapter_files import SavedAdapter, save_adapter
from moe_jax.config.parse import FieldError
from moe_jax.exchange.format import FORMATS, Export, ExportOptions, ExportOutcome, Format


@FORMATS.register("moe_jax")
class NativeFormat(Format):
    """Every adapter, as `save_adapter` writes it, without the local paths of its data.

    The path of the base may be replaced.
    """

    library = "moe_jax"
    classifies = True
    adds_tokens = True

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        if options.dtype not in (None, "float32"):
            raise FieldError(
                "dtype", "the moe_jax format stores weights unchanged; leave the option out"
            )

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        record = adapter.training
        published = adapter._replace(
            base=adapter.base._replace(path=options.base),
            training=None if record is None else record.without_local_paths(options.base),
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.tree)) + 2**20

        def write(folder: Path) -> ExportOutcome:
            save_adapter(folder, published)
            return ExportOutcome("`adapter.json` and `weights/`", is_whole_model=False)

        return Export(size, "float32", write, [])

    def loading_code(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        return (
            "import moe_jax\n\n"
            f'base = moe_jax.load_base("{options.base}")\n'
            f'adapter = moe_jax.load_adapter("{options.location}")\n'
            'model = moe_jax.AdaptedModel(base, {"tuned": adapter})\n'
            'logits = model([[0, 1, 2]], "tuned")  # rows of token ids'
        )
