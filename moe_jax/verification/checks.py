"""Checks of a base model: logits, greedy text, a training step, exports; see `verify_base`.

One copy of the base is in memory at a time: first ours, then that of transformers.
"""

import gc
import importlib.metadata
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import checksums
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.data.batch import Batch
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import CheckpointError, UserError
from moe_jax.exchange.api import export_adapter, import_adapter
from moe_jax.exchange.peft_modules import kernels, modules_of
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.hf.config import read_config_file
from moe_jax.hf.wrapper import is_wrapper
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.library import AdaptedModel, Base, load_base
from moe_jax.training.records.plan import parameter_count
from moe_jax.training.step.program import build_program
from moe_jax.verification.torch_reference import missing_package, reference_model
from moe_jax.version import __version__

TOLERANCES: dict[str, float] = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest norm of a difference of logits, relative to the norm of the logits, by dtype.

Differences of rounding are below 1e-5 in float32 on the models of the tests."""

TEXT = (
    "The frozen base computes the same as before, and each expert adds a small change to it. "
    "Once upon a time there was a little girl who lived in a house by the sea, and every day "
    "she walked along the beach to look for shells."
)
"""Text on which logits are compared; greedy decoding continues its first half."""

LEARNING_RATE = 1e-3


class Check(NamedTuple):
    """Result of one check.

    Attributes:
      name: name of the check.
      passed: None if it was not made.
      detail: the measured numbers, or the reason.
    """

    name: str
    passed: bool | None
    detail: str

    def line(self) -> str:
        """The check as one line of text."""
        state = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        return f"{self.name:<16} {state:<8} {self.detail}"


class Ours(NamedTuple):
    """Results of this library that transformers and peft are compared with.

    Attributes:
      tokens: int [1, S], the text.
      logits: float32 [1, S, V] of the base.
      greedy: tokens after the first half of the text.
      adapted: logits with the trained LoRA; None if it could not be trained.
    """

    tokens: np.ndarray
    logits: np.ndarray
    greedy: list[int]
    adapted: np.ndarray | None


def verify_base(
    path: str,
    revision: str | None = None,
    *,
    max_tokens: int,
    dtype: FloatType,
    say: Callable[[str], None],
) -> list[Check]:
    """Checks that a base computes, trains and is exported as it should.

    Args:
      path: folder or hub id.
      revision: branch, tag or commit of a hub id.
      max_tokens: largest number of tokens of the text, and of those generated.
      dtype: dtype of weights and computation.
      say: receives a line for each check.

    Returns:
      The checks in their order.

    Raises:
      CheckpointError: the base cannot be read.
    """
    checks: list[Check] = []

    def add(name: str, passed: bool | None, detail: str) -> None:
        checks.append(Check(name, passed, detail))
        say(checks[-1].line())

    base = open_base(path, revision)
    for line in _description(base, dtype):
        say(line)
    tolerance = TOLERANCES[dtype]
    with tempfile.TemporaryDirectory(prefix="moe_jax_verify_") as temporary:
        work = Path(temporary)
        ours = _run_ours(base, work, max_tokens, dtype, add)
        absent = missing_package("torch")
        if absent is not None:
            add("transformers", None, f"not compared: {absent} is not installed")
            return checks
        with _reported("logits", add), reference_model(base.folder, dtype) as reference:
            expected = reference.logits(ours.tokens)
            _compare("logits", ours.logits, expected, tolerance, add)
            _compare_greedy(ours, reference, expected, tolerance, add)
        if ours.adapted is not None and (work / "peft").is_dir():
            absent = missing_package("peft")
            if absent is not None:
                add("peft", None, f"not compared: {absent} is not installed")
            else:
                with (
                    _reported("peft", add),
                    reference_model(base.folder, dtype, work / "peft") as adapted,
                ):
                    _compare("peft", ours.adapted, adapted.logits(ours.tokens), tolerance, add)
        if ours.adapted is not None and (work / "llama").is_dir():
            with _reported("whole model", add), reference_model(work / "llama", dtype) as whole:
                _compare("whole model", ours.adapted, whole.logits(ours.tokens), tolerance, add)
    return checks


Add = Callable[[str, bool | None, str], None]


def _description(base: BaseModel, dtype: str) -> Iterator[str]:
    """Lines on versions and architecture, for a report."""
    packages = ("jax", "flax", "numpy", "transformers", "torch", "peft")
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    model = base.config
    yield f"moe_jax {__version__}, python {platform.python_version()}, {', '.join(versions)}"
    yield f"{platform.system()} {platform.machine()}, {jax.devices()[0].device_kind}, {dtype}"
    yield (
        f"base {base.path}: {model.model_type}, {model.num_layers} layers, width "
        f"{model.hidden_size}, ffn {model.intermediate_size}, {model.num_heads} heads, "
        f"{model.num_kv_heads} key-value heads, vocabulary {model.vocab_size:,}, rope "
        f"{model.rope.rope_type} theta {model.rope.rope_theta:g}, fingerprint "
        f"{base.identity.fingerprint[:16]}"
    )


@jax.default_matmul_precision("highest")
def _run_ours(base: BaseModel, work: Path, max_tokens: int, dtype: FloatType, add: Add) -> Ours:
    """Computes, trains and exports with this library; frees the base's weights.

    On GPUs, products of float32 would otherwise round their inputs to TF32, which PyTorch does not.
    """
    loaded = load_base(base.folder, dtype=dtype)  # of the revision that was opened
    tokens = _tokens(base, max_tokens)
    add("weights", True, f"{parameter_count(loaded.params):,} parameters")
    logits = np.asarray(AdaptedModel(loaded, {}, compute_dtype=dtype)(tokens))
    is_finite = bool(np.isfinite(logits).all())
    add("finite logits", is_finite, f"{tokens.size} tokens, largest {np.abs(logits).max():.4g}")
    greedy = _greedy(loaded, tokens, max_tokens, dtype)
    add("greedy decoding", True, f"{len(greedy)} tokens: {_text(base, greedy)!r}")
    adapted = None
    with _reported("training step", add):
        saved = _train(loaded, tokens, dtype, add)
        model = AdaptedModel(loaded, {"lora": saved}, compute_dtype=dtype)
        adapted = np.asarray(model(tokens, "lora"))
        changed = _relative_error(adapted, logits)
        add("adapter", changed > 0, f"changes the logits by {changed:.2e}")
        del model
    del loaded
    gc.collect()
    if adapted is not None:
        if is_wrapper(read_config_file(base.folder)):
            add("peft export", None, "not made: in a model that also reads images, names differ")
        else:
            with _reported("peft export", add):
                _export_to_peft(saved, base, work / "peft", add)
        with _reported("model export", add):
            export_adapter(saved, "llama", work / "llama", dtype=dtype)
            whole = load_base(work / "llama", dtype=dtype)
            result = np.asarray(AdaptedModel(whole, {}, compute_dtype=dtype)(tokens))
            _compare("model export", result, adapted, TOLERANCES[dtype], add, "the adapter's")
    return Ours(tokens, logits, greedy, adapted)


def _tokens(base: BaseModel, max_tokens: int) -> np.ndarray:
    """Tokens of `TEXT`, int [1, S]; ascending ids for a base without a tokenizer."""
    limit = min(max_tokens, base.config.max_position_embeddings // 2)
    try:
        ids = load_tokenizer(base.folder)(TEXT).input_ids
    except CheckpointError:
        ids = range(1, base.config.vocab_size)
    return np.array(ids[:limit], np.int32)[None]


def _text(base: BaseModel, ids: list[int]) -> str:
    try:
        return str(load_tokenizer(base.folder).decode(ids))
    except CheckpointError:
        return " ".join(map(str, ids))


def _prompt(tokens: np.ndarray) -> np.ndarray:
    return tokens[0, : max(1, tokens.shape[1] // 2)]


def _greedy(base: Base, tokens: np.ndarray, count: int, dtype: FloatType) -> list[int]:
    """The most likely tokens after the first half of the text, with the cache of decoding."""
    generator = TokenGenerator(base.config, base.params, {}, compute=ComputeConfig(dtype=dtype))
    prompt = Request(tuple(_prompt(tokens).tolist()))
    count = min(count, base.config.max_position_embeddings - len(prompt.tokens))
    steps = generator.stream([prompt], sampling=SamplingConfig(), max_new_tokens=count, eos_ids=())
    return [token for (token,) in steps if token is not None]


def _run_config(base: Base, dtype: FloatType) -> RunConfig:
    """A step with LoRA, on projections that peft can name, and with MixLoRA."""
    targets = ("o_proj", "down_proj")
    fused = {
        kernel.path[-2]
        for kernel in kernels(base.config)
        if any(module.rpartition(".")[2] != kernel.path[-2] for module in modules_of(kernel))
    }
    named = tuple(name for name in targets if name not in fused)
    methods: dict[str, dict[str, Any]] = {
        "lora": {"name": "lora", "target_modules": named},
        "mixlora": {"name": "mixlora", "num_experts": 2, "router": {"name": "top_k", "top_k": 2}},
    }
    adapters = {
        name: {
            "method": {"rank": 4, "alpha": 8.0, "target_modules": targets, **method},
            "data": {"train": {"text": {"path": "text", "schema": "text"}}, "max_length": 8},
            "optimizer": {"learning_rate": LEARNING_RATE, "schedule": {"kind": "constant"}},
            "batch_size": 1,
        }
        for name, method in methods.items()
    }
    raw = {
        "base": {"path": base.path, "param_dtype": dtype},
        "compute": {"dtype": dtype},
        "adapters": adapters,
        "training": {"steps": 2},
    }
    return parse_run_config(raw, METHODS)


def _train(base: Base, tokens: np.ndarray, dtype: FloatType, add: Add) -> SavedAdapter:
    """Makes two steps on the text; the second one measures what the first did. Returns the LoRA."""
    config = _run_config(base, dtype)
    program = build_program(config, base.config, 2, jax.devices()[:1])
    rows = np.repeat(tokens, 2, axis=0)
    ones = np.ones_like(rows)
    position = np.arange(rows.shape[1], dtype=np.int32)[None]
    batch = Batch(
        tokens=rows,
        loss_mask=np.broadcast_to(position > 0, rows.shape),
        segment_ids=ones,
        positions=np.broadcast_to(position, rows.shape),
        expert_groups=ones,
        labels=np.zeros(rows.shape, np.float32),
        reference_log_probs=np.zeros(rows.shape, np.float32),
    )
    before, losses, norms = checksums(base.params), [], []
    state = program.init_state(base.params)
    trained = None
    for _ in range(2):
        trained = jax.tree.map(np.array, state.adapters["lora"])  # the step reuses its memory
        state, metrics = program.train_step(state, base.params, program.put_train_batch(batch))
        losses.append({name: float(metrics[f"{name}/loss"]) for name in config.adapters})
        norms.append({name: float(metrics[f"{name}/grad_norm"]) for name in config.adapters})
    for name in config.adapters:
        first, second = losses[0][name], losses[1][name]
        is_finite = all(np.isfinite([first, second, norms[0][name], norms[1][name]]))
        detail = f"loss {first:.4f}, then {second:.4f}; gradient norm {norms[0][name]:.3g}"
        add(f"{name} step", bool(is_finite and second < first), detail)
    is_same = checksums(base.params) == before
    add("frozen base", is_same, "bytes unchanged" if is_same else "training changed its weights")
    method = config.methods["lora"]
    # The weights after the first step, in which the second one's loss was measured.
    return SavedAdapter(method, trained, base.config, base.identity, 1)


def _export_to_peft(adapter: SavedAdapter, base: BaseModel, folder: Path, add: Add) -> None:
    export_adapter(adapter, "peft", folder, base=str(base.folder))
    again = import_adapter(folder, base)
    is_same = checksums(again.tree) == checksums(adapter.tree)
    detail = "read back bit for bit" if is_same else "differs after reading it back"
    add("peft export", is_same, detail)


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference relative to the norm of `expected`."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _compare(
    name: str,
    found: np.ndarray,
    expected: np.ndarray,
    tolerance: float,
    add: Add,
    other: str = "transformers'",
) -> None:
    error = _relative_error(found, expected)
    same = float(np.mean(found.argmax(-1) == expected.argmax(-1)))
    detail = f"relative error {error:.2e} against {other} (at most {tolerance:g}); "
    add(name, error <= tolerance, f"{detail}{same:.1%} of the likeliest tokens are equal")


def _compare_greedy(
    ours: Ours, reference: Any, expected: np.ndarray, tolerance: float, add: Add
) -> None:
    """Compares greedy tokens; a difference is allowed where both tokens are equally likely."""
    prompt, count = _prompt(ours.tokens), len(ours.greedy)
    tokens = reference.greedy(prompt, count)
    pairs = zip(ours.greedy, tokens, strict=True)
    at = next((index for index, (left, right) in enumerate(pairs) if left != right), None)
    if at is None:
        add("greedy text", True, f"all {count} tokens equal those of transformers")
        return
    row = np.array([*prompt, *tokens[:at]], np.int32)[None]
    last = reference.logits(row)[0, -1]
    gap = float(last[tokens[at]] - last[ours.greedy[at]])
    scale = float(np.sqrt(np.mean(np.square(expected))))
    detail = (
        f"{at} of {count} tokens equal those of transformers; the next two differ by {gap:.2e} in "
        f"logit"
    )
    add("greedy text", gap <= tolerance * scale, detail)


@contextmanager
def _reported(name: str, add: Add) -> Iterator[None]:
    """Turns an error of a check into its result, so that the others are still made."""
    try:
        yield
    except UserError as error:
        add(name, False, " ".join(str(error).split()))
