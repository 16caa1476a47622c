"""A base, adapters on it and its tokenizer, made ready to answer prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jax.sharding import Mesh

from moe_jax.adapters.method import require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.run import MeshConfig
from moe_jax.data.chat import end_of_turn
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.inference.end_tokens import end_tokens
from moe_jax.inference.generator import Generator
from moe_jax.inference.limits import check_prompts, frequency_switch
from moe_jax.inference.prompts import Prompt, PromptEncoder, PromptFormat
from moe_jax.inference.text import GenerationConfig, TextGenerator
from moe_jax.loaded.model import (
    Adapter,
    BaseFiles,
    BaseInMemory,
    build_model,
    load_adapters,
    load_params,
    open_base,
)
from moe_jax.sharding.mesh import make_mesh


class InferenceSession:
    """What generation needs, the base's weights last: they are read when they are first used.

    Attributes:
      adapters: by name.
      context: tokens that the model reads at once.
    """

    def __init__(
        self,
        base: BaseFiles,
        adapters: Mapping[str, Adapter],
        *,
        dtype: FloatType = "float32",
        mesh: Mesh | None = None,
    ):
        """Joins what is loaded.

        Args:
          base: with or without its weights.
          adapters: on `mesh` if there is one.
          dtype: to compute in; weights that are still to be read are kept in it too.
          mesh: None computes on one device.

        Raises:
          CheckpointError: the base has no tokenizer that can be read.
        """
        self.adapters = dict(adapters)
        self.context = base.config.max_position_embeddings
        self._switch = frequency_switch(base.config)
        self._base = base
        self._dtype: FloatType = dtype
        self._mesh = mesh
        self._tokenizer = load_tokenizer(base.folder)
        self._end_ids = end_tokens(base.folder, self._tokenizer)
        self._generator: Generator | None = None

    @classmethod
    def open(
        cls,
        base: str | Path | BaseInMemory,
        adapters: Mapping[str, str | Path | SavedAdapter],
        *,
        revision: str | None = None,
        dtype: FloatType = "float32",
        mesh: MeshConfig | None = None,
    ) -> Self:
        """Opens a base and adapters, each from its folder or from memory.

        Raises:
          CheckpointError: one is missing or damaged, or they do not belong together.
          DeviceError: the devices do not fit the mesh.
        """
        files = open_base(base, revision)
        devices = None if mesh is None else make_mesh(mesh)
        loaded = load_adapters(adapters, files, build_model(files, dtype), devices)
        return cls(files, {one.name: one.adapter for one in loaded}, dtype=dtype, mesh=devices)

    def encoder(self, prompt_format: PromptFormat) -> PromptEncoder:
        """Makes prompts for this base; errors as in `PromptEncoder`."""
        return PromptEncoder(self._tokenizer, prompt_format)

    def require_language_models(self) -> None:
        """Refuses classifiers at once, where any of the adapters may be asked for text later.

        Raises:
          ConfigError: an adapter is one.
        """
        for name, adapter in self.adapters.items():
            require_language_model(adapter.method, name, "generate text")

    def check(self, prompts: Sequence[Prompt], config: GenerationConfig) -> None:
        """Refuses prompts that could not be answered; see `check_prompts`."""
        check_prompts(
            prompts,
            max_new_tokens=config.max_new_tokens,
            context=self.context,
            vocab_size=self._base.config.vocab_size,
            adapters={name: one.method for name, one in self.adapters.items()},
            switch=self._switch,
        )

    def text_generator(self, *, is_chat: bool, alone: bool = False) -> TextGenerator:
        """Answers prompts; with the same compiled programs each time it is asked for.

        Args:
          is_chat: whether the token with which the chat template ends a turn ends an answer too.
          alone: see `TextGenerator`.

        Raises:
          CheckpointError: a file or tensor of the base is missing or damaged.
        """
        ends = {end_of_turn(self._tokenizer)} if is_chat else set()
        ids = frozenset(token for token in ends if token is not None)
        return TextGenerator(
            self._loaded(),
            self._tokenizer,
            self._end_ids | ids,
            alone=alone,
            switch=self._switch,
        )

    def _loaded(self) -> Generator:
        if self._generator is None:
            model = build_model(self._base, self._dtype)
            params: Any = load_params(self._base, model, self._mesh)
            self._generator = Generator(
                self._base.config,
                params,
                {name: (one.method, one.tree) for name, one in self.adapters.items()},
                compute=ComputeConfig(dtype=self._dtype),
                mesh=self._mesh,
            )
        return self._generator
