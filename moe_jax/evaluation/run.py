"""The evaluation of a base and its adapters on tasks, from their names to a table."""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.loading import (
    BaseFiles,
    BaseInMemory,
    NamedAdapter,
    build_model,
    load_adapters,
    load_params,
    open_base,
)
from moe_jax.config.model import FloatType
from moe_jax.config.parse import suggest
from moe_jax.config.registry import to_plain
from moe_jax.config.run import MeshConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError
from moe_jax.evaluation.asking import Asked, Limits, ask
from moe_jax.evaluation.items import default_buckets, items_digest
from moe_jax.evaluation.journal import Journal, Record, locked
from moe_jax.evaluation.protocols import PROTOCOLS
from moe_jax.evaluation.results import Evaluation, Outcome, outcome
from moe_jax.evaluation.scorer import Scorer
from moe_jax.sharding.mesh import make_mesh
from moe_jax.tasks.selection import named_task, require_distinct
from moe_jax.tasks.task import Question, Task

BASE = "base"
"""What results call the base without an adapter."""


def evaluate(
    base: str | Path | BaseInMemory,
    tasks: str | Sequence[str | Task],
    adapters: Mapping[str, str | Path | SavedAdapter] | None = None,
    *,
    with_base: bool = False,
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    protocols: str | Sequence[str] = tuple(PROTOCOLS),
    output: str | Path | None = None,
    revision: str | None = None,
    dtype: FloatType = "float32",
    batch_size: int = 16,
    buckets: Sequence[int] = (),
    truncate: bool = False,
    mesh: MeshConfig | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluates a base, or adapters on it, on tasks.

    What is wrong with the tasks' data, the tokenizer or the adapters is found before the base's
    weights are read. The same call with the same `output` goes on where an earlier one was stopped,
    to the same results.

    Args:
      base: a folder in the Hugging Face format, a hub id, or what `moe_jax.load_base` returned.
      tasks: names (`selection.task_names`), or tasks made in Python (`selection.own_task`).
      adapters: by the name that results call it, a folder or a loaded adapter.
      with_base: evaluates the base without an adapter too; where there is no adapter it always is.
      data: for the tasks given by name, as are `split`, `limit` and `shots`; see `named_task`.
      protocols: `labels`, `choices`; see `protocols`.
      output: a folder for the results, and for the answer to each question.
      revision: of a hub id.
      dtype: in which the base is kept and all is computed; a base in memory stays as it is.
      batch_size: sequences computed at once, over all devices.
      buckets: ascending lengths that sequences are padded to, each a compilation; the base's
        context is always the last one. By default twice as long each, from 32.
      truncate: cuts tokens off the start of what is longer than the base's context, behind the
        tokens that the tokenizer puts there, instead of refusing it.
      mesh: None computes on one device.
      say: is told what goes on.

    Raises:
      UserError: what is wrong, in one line.
    """
    adapters = adapters or {}
    tasks = [tasks] if isinstance(tasks, str) else tasks
    protocols = [protocols] if isinstance(protocols, str) else protocols
    _check(tasks, protocols, batch_size, buckets, adapters)
    made = [
        named_task(task, data=data, split=split, limit=limit, shots=shots)
        if isinstance(task, str)
        else task
        for task in tasks
    ]
    require_distinct(made)
    questions = {task.name: task.questions() for task in made}

    files = open_base(base, revision)
    model = build_model(files, dtype)
    devices = None if mesh is None else make_mesh(mesh)
    loaded = load_adapters(adapters, files, model, devices)
    models: list[NamedAdapter | None] = [None, *loaded] if with_base or not loaded else [*loaded]

    context = files.config.max_position_embeddings
    limits = Limits(files.config.vocab_size, context, truncate)
    asked = ask(questions, protocols, load_tokenizer(files.folder), limits)
    folder = None if output is None else Path(output).expanduser()
    with locked(folder) if folder is not None else contextlib.nullcontext():
        runs = [
            (one, asking, _journal(folder, files, one, asking, dtype))
            for one in models
            for asking in asked
        ]
        scorer = None
        if not all(journal.is_complete for *_, journal in runs):
            scorer = Scorer(
                model,
                load_params(files, model, devices),
                batch_size=batch_size,
                buckets=_buckets(buckets, context),
                candidates=max(
                    len(i.candidates) for a in asked for items in a.groups for i in items
                ),
                mesh=devices,
            )
        outcomes = []
        for one, asking, journal in runs:
            say(_announcement(one, asking, journal))
            outcomes.append(_answer(scorer, one, asking, journal))
        evaluation = Evaluation(_settings(files, models, made, questions, asked, dtype), outcomes)
        if folder is not None:
            evaluation.save(folder)
    return evaluation


def _check(
    tasks: Sequence[str | Task],
    protocols: Sequence[str],
    batch_size: int,
    buckets: Sequence[int],
    adapters: Mapping[str, Any],
) -> None:
    if not tasks:
        raise ConfigError("tasks: none is given")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise ConfigError(
                f"protocols: there is none called {protocol!r}; {suggest(protocol, PROTOCOLS)}"
            )
    if not protocols or len(set(protocols)) < len(protocols):
        raise ConfigError(f"protocols: give each once, of {', '.join(PROTOCOLS)}")
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be positive, got {batch_size}")
    if list(buckets) != sorted(set(buckets)) or any(length < 1 for length in buckets):
        raise ConfigError(f"buckets: must be positive and ascend strictly, got {list(buckets)}")
    for name in adapters:
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is None or name == BASE:
            raise ConfigError(
                f"adapter {name!r}: its name must hold letters, digits, '_', '-' and '.' only, and "
                f"not be {BASE!r}; give it another with NAME=DIR"
            )


def _buckets(buckets: Sequence[int], context: int) -> tuple[int, ...]:
    if not buckets:
        return default_buckets(context)
    return (*(length for length in buckets if length < context), context)


def _journal(
    folder: Path | None,
    base: BaseFiles,
    adapter: NamedAdapter | None,
    asking: Asked,
    dtype: FloatType,
) -> Journal:
    name = BASE if adapter is None else adapter.name
    file = None
    if folder is not None:
        file = folder / "predictions" / name / f"{asking.task}.{asking.protocol}.jsonl"
    answers = [question.answer for question, _ in asking.prepared]
    identity = {
        "base": base.identity.fingerprint,
        "adapter": None if adapter is None else adapter.digest,
        "items": items_digest(asking.groups, answers),
        "dtype": dtype,
    }
    return Journal(file, identity, len(asking.prepared))


def _announcement(adapter: NamedAdapter | None, asking: Asked, journal: Journal) -> str:
    name = BASE if adapter is None else adapter.name
    line = f"{name}: {asking.task}, {asking.protocol}: {len(asking.prepared)} questions"
    if journal.records:
        line += f", {len(journal.records)} answered before"
    if asking.cut:
        line += f", {asking.cut} cut at their start to fit the context"
    return line


def _answer(
    scorer: Scorer | None, adapter: NamedAdapter | None, asking: Asked, journal: Journal
) -> Outcome:
    """Has all questions answered that the journal does not know the answers of."""
    groups = asking.groups
    protocol = PROTOCOLS[asking.protocol]
    name = BASE if adapter is None else adapter.name
    known = [index in journal.records for index in range(len(groups))]
    partial: dict[int, dict[int, tuple[float, ...]]] = {}
    own = None if adapter is None else adapter.adapter
    batches = () if scorer is None or all(known) else scorer.scores(groups, own, known)
    bar = tqdm(
        total=len(groups),
        initial=sum(known),
        desc=f"{name} {asking.task} {asking.protocol}",
        unit="question",
        leave=False,
        disable=None,  # shown on a terminal only
    )
    with bar:
        for batch in batches:
            done = []
            for index, place, score in batch:
                if known[index]:
                    continue  # it only shared the batch
                partial.setdefault(index, {})[place] = score.values
                if len(partial[index]) == len(groups[index]):
                    parts = partial.pop(index)
                    scores = [value for place in sorted(parts) for value in parts[place]]
                    question = asking.prepared[index].question
                    picked = protocol.pick(question, _finite(scores, question, name))
                    done.append(_record(index, question, scores, picked))
            journal.add(done)
            bar.update(len(done))
    return outcome(name, asking.task, asking.protocol, protocol.measures, journal.finish())


def _finite(scores: list[float], question: Question, model: str) -> list[float]:
    if not all(map(math.isfinite, scores)):
        raise ConfigError(
            f"{model}: the scores of {question.where} are not finite; take another dtype "
            "(bfloat16 or float32), or look at the checkpoint's weights"
        )
    return scores


def _record(index: int, question: Question, scores: list[float], picked: dict[str, int]) -> Record:
    return {
        "question": index,
        "where": question.where,
        "subject": question.subject,
        "answer": question.answer,
        "picked": picked,
        "scores": scores,
    }


def _settings(
    base: BaseFiles,
    models: Sequence[NamedAdapter | None],
    tasks: Sequence[Task],
    questions: Mapping[str, Sequence[Question]],
    asked: Sequence[Asked],
    dtype: FloatType,
) -> dict[str, Any]:
    """What was evaluated and how, as plain JSON values."""
    return {
        "base": base.identity._asdict(),
        "dtype": dtype,
        "models": [
            {"name": BASE, "adapter": None}
            if one is None
            else {
                "name": one.name,
                "adapter": one.origin,
                "digest": one.digest,
                "method": to_plain(one.saved.method),
                "step": one.saved.step,
            }
            for one in models
        ],
        "tasks": [
            {
                **to_plain(task),
                "name": task.name,
                "questions": len(questions[task.name]),
                "cut": {a.protocol: a.cut for a in asked if a.task == task.name},
            }
            for task in tasks
        ],
    }
