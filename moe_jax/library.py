"""Public API: load a base, put adapters on it, compute, train, save, load and convert."""

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.checkpoints import adapter_files
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ComputeConfig, FloatType, StorageType
from moe_jax.config.parse import FieldError, located, suggest
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.data.new_tokens import load_extended_tokenizer, with_token_id
from moe_jax.data.token_rows import load_token_rows
from moe_jax.errors import ConfigError, DataError
from moe_jax.exchange import api as exchange
from moe_jax.exchange.format import Weighting
from moe_jax.exchange.hub import HubTarget, push_folder, require_access
from moe_jax.files.folders import require_unused
from moe_jax.hf import base_model
from moe_jax.hf.base_model import BaseModel, open_base, resolve_checkpoint, resolve_recorded
from moe_jax.hf.load import load_base_params
from moe_jax.inference.api import InferenceSession
from moe_jax.layers.frozen import storage_of
from moe_jax.loaded.inference_model import Adapter
from moe_jax.loaded.run_adapters import resolve_adapter
from moe_jax.models.adapted import SINGLE, CompiledLlama, apply, single_adapter, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.processes.agreement import require_one_process
from moe_jax.training.run import loop
from moe_jax.training.run.completion import TrainResult


@dataclass(frozen=True)
class Base(BaseModel):
    """A base model with its parameters in memory; see `BaseModel` for further attributes.

    Attributes:
      param_dtype: storage of the parameters.
    """

    param_dtype: StorageType = "float32"

    @functools.cached_property
    def session(self) -> InferenceSession:
        """Session of `generate`; computes in the dtype of the parameters that are not quantized."""
        dtype: Any = storage_of(self.param_dtype).dtype.name
        return InferenceSession(self, {}, dtype=dtype)


def load_base(
    path: str | Path, *, revision: str | None = None, dtype: StorageType = "float32"
) -> Base:
    """Loads a Llama from a folder in the Hugging Face format or from the hub, on one device.

    Args:
      path: folder or hub id.
      revision: hub revision.
      dtype: storage of the parameters.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or its architecture is not supported.
      ConfigError: this process is one of several.
    """
    require_one_process()
    base = open_base(path, revision)
    params = load_base_params(base.folder, base.config, dtype)
    return Base(**{**vars(base), "params": params}, param_dtype=dtype)


class AdaptedModel:
    """A base with adapters on one device.

    Attributes:
      base: frozen base.
      methods: method of each adapter; read-only.
      adapters: weights of each adapter, `{name: tree}`; may be replaced.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, AdapterMethod | SavedAdapter],
        *,
        seed: int = 0,
        compute_dtype: FloatType = "float32",
    ):
        """Puts adapters on a base.

        Args:
          base: result of `load_base`.
          adapters: saved adapters, or methods, whose weights are initialized.
          seed: random seed of the initialization.
          compute_dtype: see `ComputeConfig.dtype`.

        Raises:
          CheckpointError: a saved adapter was trained on another base.
        """
        saved = {n: a for n, a in adapters.items() if isinstance(a, SavedAdapter)}
        for name, adapter in saved.items():
            base.require_trained_on(f"adapter {name!r}", adapter.base, "load that base")
        self.base = base
        methods: dict[str, AdapterMethod] = {}
        for name, adapter in adapters.items():
            with located(f"adapter {name!r}"):
                methods[name] = (
                    adapter.method
                    if isinstance(adapter, SavedAdapter)
                    else with_token_id(adapter, base)
                )
        self.methods: Mapping[str, AdapterMethod] = MappingProxyType(methods)
        model = LlamaForCausalLM(base.config, ComputeConfig(dtype=compute_dtype))
        self._llama = CompiledLlama(model)
        self.adapters: dict[str, Any] = {name: a.tree for name, a in saved.items()}
        untrained = {name: m for name, m in self.methods.items() if name not in saved}
        for name, method in untrained.items():
            with located(f"adapter {name!r}"):
                method.check_model(base.config)
            init = self._llama.jit(untrained_adapter, model, method)
            self.adapters[name] = nn.meta.unbox(init(base.params, jax.random.key(seed)))
        self._compute_dtype: FloatType = compute_dtype
        self._opened: tuple[Any, list[Any], InferenceSession] | None = None

    def __call__(
        self, tokens: Any, adapter: str | None = None, segment_ids: Any = None
    ) -> jax.Array:
        """Logits of the next token, float32 [B, S, V]; for a classifier, scores, float32 [B, N].

        An adapter with N new tokens whose ids exceed V - 1 has logits for them too.

        Args:
          tokens: int [B, S].
          adapter: adapter of all rows; None is the base alone.
          segment_ids: int [B, S], 0 at padding; None is no padding.

        Raises:
          ConfigError: there is no such adapter.
          DataError: `tokens` has another type or shape or no token, or an id is beyond the base's
            vocabulary and the adapter's new tokens.
        """
        tree = {} if adapter is None else {SINGLE: self._weights(adapter)}
        method = None if adapter is None else self.methods[adapter]
        tokens, methods = _token_array(tokens), [] if method is None else [method]
        vocab_size = total_vocab_size(self.base.config.vocab_size, methods)
        if not 0 <= tokens.min() <= tokens.max() < vocab_size:
            # Under jit an embedding lookup out of bounds gives NaN, not an error.
            raise DataError(
                f"tokens: ids from {tokens.min()} to {tokens.max()}, but {self.base.folder} has "
                f"embeddings for 0 to {vocab_size - 1}; use that base's own tokenizer"
            )
        model = self._llama.with_rows(single_adapter(method, tokens.shape[0]))
        segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
        predict = self._llama.jit(_predictions, model)
        return predict(self.base.params, tree, jnp.asarray(tokens), segment_ids)

    @property
    def session(self) -> InferenceSession:
        """Session of `generate`; created again if an adapter's weights are replaced."""
        leaves, structure = jax.tree.flatten(self.adapters)
        if self._opened is not None:
            known_structure, known, session = self._opened
            if structure == known_structure and all(map(operator.is_, leaves, known)):
                return session
        adapters = {name: Adapter(self.methods[name], tree) for name, tree in self.adapters.items()}
        session = InferenceSession(self.base, adapters, dtype=self._compute_dtype)
        self._opened = (structure, leaves, session)
        return session

    def save(self, adapter: str, folder: str | Path, step: int = 0) -> None:
        """Writes an adapter to a folder that `load_adapter` reads; see `save_adapter`."""
        base, tree = self.base, self._weights(adapter)
        saved = SavedAdapter(self.methods[adapter], tree, base.config, base.identity, step)
        adapter_files.save_adapter(Path(folder), saved)

    def _weights(self, adapter: str) -> Any:
        if adapter not in self.adapters:
            hint = suggest(adapter, self.adapters)
            raise ConfigError(f"adapter {adapter!r}: is not in this model; {hint}")
        return self.adapters[adapter]


def _token_array(tokens: Any) -> np.ndarray:
    """The tokens as an array [B, S]; refuses other shapes and types, and no tokens."""
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of different lengths
        found = "rows of different lengths; pad them, and give segment_ids"
    else:
        if array.ndim == 2 and array.size and np.issubdtype(array.dtype, np.integer):
            return array
        found = f"{array.dtype} {list(array.shape)}"
    raise DataError(f"tokens: expected int [rows, length], got {found}")


def _predictions(
    model: LlamaForCausalLM, params: Any, adapters: Any, tokens: jax.Array, segment_ids: Any
) -> jax.Array:
    """Logits of the next token, or the scores of a classification adapter."""

    def compute(module: LlamaForCausalLM) -> jax.Array:
        hidden = module.hidden_states(tokens, segment_ids=segment_ids)
        mask = jnp.ones_like(tokens, bool) if segment_ids is None else segment_ids != 0
        return module.scores(hidden, mask)[SINGLE] if is_classifier else module.logits(hidden)

    is_classifier = any(rows.method.classification is not None for rows in model.adapter_rows)
    return apply(model, params, adapters, compute)


def load_adapter(folder: str | Path, *, revision: str | None = None) -> SavedAdapter:
    """Reads an adapter's folder; see `adapter_files.load_adapter`.

    Args:
      folder: folder of an adapter, or of a run that has one; or hub id `owner/name`.
      revision: hub revision.
    """
    return adapter_files.load_adapter(resolve_adapter(folder, revision))


def export_adapter(
    adapter: SavedAdapter | str | Path,
    to: str,
    output: str | Path,
    *,
    dtype: FloatType | None = None,
    base: str | None = None,
    weights: Weighting | None = None,
    data: str | Path | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Writes an adapter for another tool; see `exchange.export_adapter`.

    Args:
      adapter: adapter, or its folder or hub id.
      to: format: `mixlora` or `peft` for the adapter alone; `mixtral` or `llama` for a whole model;
        `moe_jax`, our own, for sharing.
      output: folder that does not exist yet, or is empty.
      dtype: dtype of the written tensors; by default that of the base for a whole model, and
        float32, as trained, for an adapter.
      base: path of the base for the other tool, and where a whole model's base is read; by default
        the path at training.
      weights: weights of the experts that `llama` merges: `average` (default) or `utilization`.
      data: text file on which `llama` measures the loads of experts and the change by merging; see
        `load_token_rows`. Required for adapters with experts.
      push_to_hub: `OWNER/NAME`, repository on the hub to upload the complete `output` to. Access is
        checked first; `output` is kept in any case.
      private, revision, commit_message: see `HubTarget`; with `push_to_hub` only.
      say: receives a line with the size of the export before it is written.

    Returns:
      One sentence each: what the format omits or states differently, what was measured, and the
      address on the hub.
    """
    target = _hub_target(push_to_hub, private, revision, commit_message)
    if target is not None:
        require_unused(Path(output))
        require_access(target)
    saved = adapter if isinstance(adapter, SavedAdapter) else load_adapter(adapter)
    tokens = None
    if data is not None:
        require_unused(Path(output))
        folder = resolve_recorded(saved.base) if base is None else resolve_checkpoint(base)
        length = min(512, saved.model.max_position_embeddings)
        tokenizer = load_extended_tokenizer(folder, saved.model, [saved.method])
        tokens = load_token_rows(Path(data), tokenizer, length=length)
    notes = exchange.export_adapter(
        saved,
        to,
        Path(output),
        dtype=dtype,
        base=base,
        weights=weights,
        tokens=tokens,
        data_name="" if data is None else Path(data).name,
        location=push_to_hub,
        say=say,
    )
    if target is not None:
        known_base = saved.base.path if base is None else base
        if exchange.names_base(to) and Path(known_base).expanduser().exists():
            notes.append(
                f"it names the base by the folder {known_base}, which others do not have; give "
                "its hub id with --base OWNER/NAME"
            )
        notes.append(f"pushed to {push_folder(Path(output), target)}")
    return notes


def _hub_target(
    push_to_hub: str | None, private: bool, revision: str | None, commit_message: str | None
) -> HubTarget | None:
    if push_to_hub is not None:
        return HubTarget(push_to_hub, private, revision, commit_message)
    given = {"private": private, "revision": revision, "commit_message": commit_message}
    for name, value in given.items():
        if value:
            raise FieldError(
                name, "has no effect without `push_to_hub`; leave it out, or give a repository"
            )
    return None


def import_adapter(
    source: str | Path, base: Base | str | Path, output: str | Path | None = None
) -> SavedAdapter:
    """Reads an adapter of PEFT or MoE-PEFT; see `exchange.import_adapter`.

    Args:
      source: folder, or hub id `owner/name`.
      base: base that it was trained on, or its folder or hub id.
      output: folder to write the adapter to in our own format; does not exist yet, or is empty.
    """
    if output is not None:
        require_unused(Path(output))
    source = base_model.resolve_adapter(source)
    adapter = exchange.import_adapter(source, base)
    if output is not None:
        adapter_files.save_adapter(Path(output), adapter)
    return adapter


def parse_config(config: Any) -> RunConfig:
    """Parses nested mappings or an `ml_collections.ConfigDict`; rejects unknown fields."""
    plain = config.to_dict() if hasattr(config, "to_dict") else config
    return parse_run_config(plain, METHODS)


def train(config: Any, workdir: str | Path) -> TrainResult:
    """Trains adapters, like `train.py`; see `moe_jax.training.run.loop.train`.

    While the run lasts, a single process in whose main thread it is called handles SIGINT and
    SIGTERM: the first signal saves the state after the current step and ends the run, a second one
    ends the process. The former handlers are installed again at the end.

    Args:
      config: a `RunConfig`, or an argument of `parse_config`.
      workdir: folder of the run; resumes if it holds a run.
    """
    # Imported late, since it imports the libraries of all tasks.
    from moe_jax.evaluation.training_evaluator import TrainingTaskEvaluation

    parsed = config if isinstance(config, RunConfig) else parse_config(config)

    return loop.train(parsed, Path(workdir), task_evaluation=TrainingTaskEvaluation())
