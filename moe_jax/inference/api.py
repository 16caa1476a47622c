"""Generation from a base and its adapters: `generate`, `generate_stream` and their session."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, Unpack

from jax.sharding import Mesh

from moe_jax.adapters.method import require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.run import MeshConfig
from moe_jax.data.chat_template import end_of_turn
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.errors import ConfigError
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.inference.generator import TokenGenerator
from moe_jax.inference.limits import check_prompts, frequency_switch
from moe_jax.inference.prompts import Message, Prompt, PromptEncoder
from moe_jax.inference.settings import (
    GenerateSettings,
    GenerationConfig,
    PromptFormat,
    StreamSettings,
    parse_settings,
)
from moe_jax.inference.stopping import end_tokens
from moe_jax.inference.text_generator import TextGenerator
from moe_jax.loaded.inference_model import Adapter, build_model, load_adapters, load_params
from moe_jax.sharding.mesh import make_mesh


class InferenceSession:
    """A base, its adapters and its tokenizer. Reads the weights of the base at their first use.

    Attributes:
      adapters: adapters by name.
      context: largest number of tokens of a prompt and its answer together.
      unread_note: see `BaseModel.unread_note`.
    """

    def __init__(
        self,
        base: BaseModel,
        adapters: Mapping[str, Adapter],
        *,
        dtype: FloatType = "float32",
        mesh: Mesh | None = None,
    ):
        """Loads the tokenizer.

        Args:
          base: base with or without its weights.
          adapters: adapters by name, on `mesh` if there is one.
          dtype: dtype of the computation, and of weights that are not loaded yet.
          mesh: None computes on one device.

        Raises:
          CheckpointError: the base has no readable tokenizer.
          ConfigError: the adapters have different new tokens.
        """
        self.adapters = dict(adapters)
        self.context = base.config.max_position_embeddings
        self.unread_note = base.unread_note
        self._switch_length = frequency_switch(base.config)
        self._base = base
        self._dtype: FloatType = dtype
        self._mesh = mesh
        methods = [adapter.method for adapter in self.adapters.values()]
        self._tokenizer = load_extended_tokenizer(base.folder, base.config, methods, visible=True)
        self._end_ids = end_tokens(base.folder, self._tokenizer)
        self._generator: TokenGenerator | None = None

    @classmethod
    def open(
        cls,
        base: str | Path | BaseModel,
        adapters: Mapping[str, str | Path | SavedAdapter],
        *,
        revision: str | None = None,
        dtype: FloatType = "float32",
        mesh: MeshConfig | None = None,
    ) -> Self:
        """Opens a base and adapters, each from its folder or from memory.

        Raises:
          CheckpointError: one is missing or damaged, or an adapter belongs to another base.
          DeviceError: there are too few devices for the mesh.
        """
        files = open_base(base, revision)
        devices = None if mesh is None else make_mesh(mesh)
        loaded = load_adapters(adapters, files, build_model(files, dtype), devices)
        return cls(
            files, {adapter.name: adapter.adapter for adapter in loaded}, dtype=dtype, mesh=devices
        )

    def encoder(self, prompt_format: PromptFormat) -> PromptEncoder:
        """Encoder of prompts for this base; errors as in `PromptEncoder`."""
        return PromptEncoder(self._tokenizer, prompt_format)

    def require_language_models(self) -> None:
        """Rejects classifiers, where any of the adapters may be asked for text later.

        Raises:
          ConfigError: an adapter is a classifier.
        """
        for name, adapter in self.adapters.items():
            require_language_model(adapter.method, name, "generate text")

    def check(self, prompts: Sequence[Prompt], config: GenerationConfig) -> None:
        """Rejects prompts that cannot be answered; see `check_prompts`."""
        check_prompts(
            prompts,
            max_new_tokens=config.max_new_tokens,
            context=self.context,
            vocab_size=self._base.config.vocab_size,
            adapters={name: adapter.method for name, adapter in self.adapters.items()},
            switch_length=self._switch_length,
        )

    def text_generator(
        self, *, is_chat: bool, decode_without_prompt: bool = False
    ) -> TextGenerator:
        """Generator of answers; all generators of a session share their compiled programs.

        Args:
          is_chat: the token that ends a turn in the chat template ends an answer too.
          decode_without_prompt: see `TextGenerator`.

        Raises:
          CheckpointError: a file or tensor of the base is missing or damaged.
        """
        ends = {end_of_turn(self._tokenizer)} if is_chat else set()
        ids = frozenset(token for token in ends if token is not None)
        return TextGenerator(
            self._token_generator(),
            self._tokenizer,
            self._end_ids | ids,
            decode_without_prompt=decode_without_prompt,
            switch_length=self._switch_length,
        )

    def _token_generator(self) -> TokenGenerator:
        if self._generator is None:
            model = build_model(self._base, self._dtype)
            params: Any = load_params(self._base, model, self._mesh)
            self._generator = TokenGenerator(
                self._base.config,
                params,
                {name: (adapter.method, adapter.tree) for name, adapter in self.adapters.items()},
                compute=ComputeConfig(dtype=self._dtype),
                mesh=self._mesh,
            )
        return self._generator


PromptLike = str | Sequence[Message]
"""Text, or a conversation: messages with `role` and `content`, the last one not the assistant's."""


class HasSession(Protocol):
    """Model in memory, such as a `moe_jax.Base` or a `moe_jax.AdaptedModel`."""

    @property
    def session(self) -> InferenceSession: ...


def generate(
    model: HasSession | str | Path,
    prompts: str | Sequence[PromptLike],
    adapter: str | Sequence[str | None] | None = None,
    *,
    batch_size: int = 8,
    **settings: Unpack[GenerateSettings],
) -> list[str]:
    """Answers prompts, `batch_size` side by side.

    Args:
      model: base or adapted model in memory, or folder or hub id of a base.
      prompts: a text, or several texts or conversations.
      adapter: name of the adapter that answers, or a list with one per prompt; None is the base.
      batch_size: number of answers that are generated side by side.
      **settings: fields of `SamplingConfig`, `GenerationConfig` and `PromptFormat`: temperature,
        top_k, top_p, min_p, repetition_penalty; max_new_tokens, samples, stop, seed; chat, system,
        template. By default greedy decoding of up to 128 tokens.

    Returns:
      The answers in the order of the prompts; several samples of a prompt follow one another.

    Raises:
      UserError: an argument is invalid.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size: must be a positive number, got {batch_size!r}")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    session, encoded, config, is_chat = _prepare(model, prompts, adapter, settings)
    texts = {}
    for answers in session.text_generator(is_chat=is_chat).answers(encoded, config, batch_size):
        texts |= {(answer.prompt, answer.sample): answer.text for answer in answers}
    return [texts[key] for key in sorted(texts)]


def generate_stream(
    model: HasSession | str | Path,
    prompt: PromptLike,
    adapter: str | None = None,
    **settings: Unpack[StreamSettings],
) -> Iterator[str]:
    """Answers one prompt and yields the text while it is generated.

    Args:
      model: base or adapted model in memory, or folder or hub id of a base.
      prompt: a text or a conversation.
      adapter: name of the adapter that answers; None is the base.
      **settings: as in `generate`, without `samples`.

    Yields:
      Pieces of the answer. Together they equal the answer that `generate` gives for this prompt.

    Raises:
      UserError: an argument is invalid; raised before the first piece.
    """
    if "samples" in settings:
        raise TypeError("generate_stream() got an unexpected keyword argument 'samples'")
    session, (encoded,), config, is_chat = _prepare(model, [prompt], adapter, settings)
    pieces = session.text_generator(is_chat=is_chat).stream(encoded, config)
    return (piece.text for piece in pieces if piece.text)


def _prepare(
    model: HasSession | str | Path,
    prompts: Sequence[PromptLike],
    adapter: str | Sequence[str | None] | None,
    settings: Mapping[str, Any],
) -> tuple[InferenceSession, list[Prompt], GenerationConfig, bool]:
    """Session, checked prompts, configuration, and True if any prompt is a conversation."""
    config, prompt_format = parse_settings(settings)
    if not prompts:
        raise ConfigError("prompts: the list is empty; give at least one")
    if adapter is None or isinstance(adapter, str):
        names = [adapter] * len(prompts)
    else:
        names = list(adapter)
    if len(names) != len(prompts):
        raise ConfigError(f"adapter: {len(names)} names for {len(prompts)} prompts; give one each")
    session = InferenceSession.open(model, {}) if isinstance(model, str | Path) else model.session
    encoder = session.encoder(prompt_format)
    encoded = []
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True), 1):
        where = f"prompt {number}" if len(prompts) > 1 else "the prompt"
        if isinstance(prompt, str):
            tokens = encoder.text(prompt, where)
        else:
            tokens = encoder.conversation(prompt, where)
        encoded.append(Prompt(tokens, name, where))
    session.check(encoded, config)
    return (
        session,
        encoded,
        config,
        prompt_format.chat or not all(isinstance(prompt, str) for prompt in prompts),
    )
