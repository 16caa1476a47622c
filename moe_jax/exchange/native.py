"""Our own format, as an export: with a model card, to be given away."""

from pathlib import Path

import jax

from moe_jax.checkpoints.adapter_files import SavedAdapter, save_adapter
from moe_jax.config.parse import FieldError
from moe_jax.exchange.format import FORMATS, Export, ExportOptions, ExportOutcome, Format


@FORMATS.register("moe_jax")
class OwnFormat(Format):
    """Every adapter, as `save_adapter` writes it, without the places where its data lay.

    The base's path may become another.
    """

    library = "moe_jax"
    classifies = True

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        if options.dtype != "float32":
            raise FieldError(
                "dtype", "the moe_jax format keeps the weights as they are; leave it out"
            )

    def prepare(self, adapter: SavedAdapter, options: ExportOptions) -> Export:
        record = adapter.training
        known = adapter._replace(
            base=adapter.base._replace(path=options.base),
            training=None if record is None else record.to_give_away(options.base),
        )
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.tree)) + 2**20

        def write(folder: Path) -> ExportOutcome:
            save_adapter(folder, known)
            return ExportOutcome("`adapter.json` and `weights/`", whole=False)

        return Export(size, write, [])

    def loading(self, adapter: SavedAdapter, options: ExportOptions) -> str:
        return (
            "import moe_jax\n\n"
            f'base = moe_jax.load_base("{options.base}")\n'
            f'adapter = moe_jax.load_adapter("{options.name}")\n'
            'model = moe_jax.AdaptedModel(base, {"it": adapter})\n'
            'logits = model([[0, 1, 2]], "it")  # of token ids'
        )
