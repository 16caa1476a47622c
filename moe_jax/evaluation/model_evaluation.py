"""The evaluation of a base and its adapters on tasks, from their names to a table."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, suggest
from moe_jax.config.run import MeshConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError
from moe_jax.evaluation.answer_journal import locked
from moe_jax.evaluation.classifier_runner import (
    classification_announcement,
    classify_rows,
    match_classifiers,
    open_classification_journal,
)
from moe_jax.evaluation.evaluation_results import Evaluation, require_nothing_lost
from moe_jax.evaluation.question_runner import (
    announcement,
    answer,
    model_name,
    open_journal,
    settings,
)
from moe_jax.evaluation.scorer import Scorer, complete_buckets
from moe_jax.evaluation.scoring_protocols import SCORING_PROTOCOLS, BaseLimits, ask, max_candidates
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.loaded.model import BASE, NamedAdapter, build_model, load_adapters, load_params
from moe_jax.sharding.mesh import make_mesh
from moe_jax.tasks.selection import named_task, require_distinct
from moe_jax.tasks.task import Task


def evaluate(
    base: str | Path | BaseModel,
    tasks: str | Sequence[str | Task],
    adapters: Mapping[str, str | Path | SavedAdapter] | None = None,
    *,
    with_base: bool = False,
    data: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    protocols: str | Sequence[str] = tuple(SCORING_PROTOCOLS),
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

    files = open_base(base, revision)
    model = build_model(files, dtype)
    devices = None if mesh is None else make_mesh(mesh)
    loaded = load_adapters(adapters, files, model, devices)
    classifiers = [one for one in loaded if one.saved.method.classification is not None]
    models: list[NamedAdapter | None] = [one for one in loaded if one not in classifiers]
    models = [None, *models] if with_base or not loaded else models
    questions = {task.name: task.questions() for task in made if models}

    context = files.config.max_position_embeddings
    limits = BaseLimits(files.config.vocab_size, context, truncate)
    tokenizer = load_tokenizer(files.folder)
    asked = ask(questions, protocols, tokenizer, limits)
    to_classify = match_classifiers(classifiers, made, tokenizer, limits, answered=bool(models))
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        names = [model_name(one) for one in [*models, *classifiers]]
        require_nothing_lost(folder, [task.name for task in made], names)
    with locked(folder) if folder is not None else contextlib.nullcontext():
        runs = [
            (one, asking, open_journal(folder, files, one, asking, dtype))
            for one in models
            for asking in asked
        ]
        classifying = [
            (one, rows, open_classification_journal(folder, files, one, rows, dtype))
            for one, rows in to_classify
        ]
        scorer = None
        if not all(journal.is_complete for *_, journal in (*runs, *classifying)):
            scorer = Scorer(
                model,
                load_params(files, model, devices),
                batch_size=batch_size,
                buckets=complete_buckets(buckets, context),
                candidates=max([max_candidates(asked), *(r.num_scores for _, r in to_classify)]),
                mesh=devices,
            )
        outcomes = []
        for one, asking, journal in runs:
            name, adapter = model_name(one), None if one is None else one.adapter
            say(announcement(name, asking, journal))
            outcomes.append(answer(scorer, name, adapter, asking, journal))
        for one, rows, journal in classifying:
            say(classification_announcement(one, rows, journal))
            outcomes.append(classify_rows(scorer, one, rows, journal))
        read = {rows.task.name: rows.rows for _, rows in to_classify} | questions
        said = settings(files, [*models, *classifiers], made, read, asked, dtype)
        evaluation = Evaluation(said, outcomes)
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
        raise FieldError("tasks", "none is given")
    for protocol in protocols:
        if protocol not in SCORING_PROTOCOLS:
            hint = suggest(protocol, SCORING_PROTOCOLS)
            raise FieldError("protocols", f"there is none called {protocol!r}; {hint}")
    if not protocols or len(set(protocols)) < len(protocols):
        raise FieldError("protocols", f"give each once, of {', '.join(SCORING_PROTOCOLS)}")
    if batch_size < 1:
        raise FieldError("batch_size", f"must be positive, got {batch_size}")
    if list(buckets) != sorted(set(buckets)) or any(length < 1 for length in buckets):
        raise FieldError("buckets", f"must be positive and ascend strictly, got {list(buckets)}")
    for name in adapters:
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is None or name == BASE:
            raise ConfigError(
                f"adapter {name!r}: its name must hold letters, digits, '_', '-' and '.' only, and "
                f"not be {BASE!r}; give it another with NAME=DIR"
            )
