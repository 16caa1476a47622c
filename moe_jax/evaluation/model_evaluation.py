"""Evaluation of a base model and its adapters on tasks: `evaluate`."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, suggest
from moe_jax.config.run import MeshConfig
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.errors import ConfigError
from moe_jax.evaluation.answer_journal import Journal, locked
from moe_jax.evaluation.classifier_runner import (
    LabeledTask,
    classification_announcement,
    classify_rows,
    match_classifiers,
    open_classification_journal,
)
from moe_jax.evaluation.evaluation_results import (
    Evaluation,
    evaluation_settings,
    require_nothing_lost,
)
from moe_jax.evaluation.outcomes import TaskOutcome
from moe_jax.evaluation.question_runner import (
    answer_questions,
    model_name,
    open_journal,
    question_announcement,
)
from moe_jax.evaluation.scorer import ROW_LENGTH, Scorer
from moe_jax.evaluation.scoring_protocols import (
    SCORING_PROTOCOLS,
    PreparedTask,
    base_limits,
    prepare_tasks,
)
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.loaded.inference_model import (
    BASE,
    NamedAdapter,
    build_model,
    load_adapters,
    load_params,
)
from moe_jax.sharding.mesh import make_mesh
from moe_jax.tasks.selection import named_task, require_distinct
from moe_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Settings of `evaluate`. The first four apply to tasks given by name; see `named_task`.

    Attributes:
      data: folder with a subfolder for each task; None reads the hub's data.
      split: split of the data; None is the default split of each task.
      limit: number of rows of each task, from the start; None is all.
      shots: number of answered examples before each question; None is the default of each task.
      protocols: names of the scoring protocols, `labels` or `choices` or both.
      dtype: dtype of weights and computation. A base in memory keeps its dtype.
      batch_size: number of rows in a batch, over all devices.
      row_length: tokens of a row, into which questions are packed; see `pack_trees`.
      truncate: cuts prompts longer than the context at their start, after the special tokens that
        lead them, instead of rejecting them.
      mesh: device mesh; None is one device.
    """

    data: str | Path | None = None
    split: str | None = None
    limit: int | None = None
    shots: int | None = None
    protocols: str | Sequence[str] = tuple(SCORING_PROTOCOLS)
    dtype: FloatType = "float32"
    batch_size: int = 16
    row_length: int = ROW_LENGTH
    truncate: bool = False
    mesh: MeshConfig | None = None

    def __post_init__(self):
        protocols = self.protocol_names
        for protocol in protocols:
            if protocol not in SCORING_PROTOCOLS:
                hint = suggest(protocol, SCORING_PROTOCOLS)
                raise FieldError("protocols", f"there is none called {protocol!r}; {hint}")
        if not protocols or len(set(protocols)) < len(protocols):
            raise FieldError("protocols", f"give each once, of {', '.join(SCORING_PROTOCOLS)}")
        if self.limit is not None and self.limit < 1:
            raise FieldError("limit", f"must be positive, got {self.limit}")
        if self.shots is not None and self.shots < 0:
            raise FieldError("shots", f"must not be negative, got {self.shots}")
        if self.batch_size < 1:
            raise FieldError("batch_size", f"must be positive, got {self.batch_size}")
        if self.row_length < 1:
            raise FieldError("row_length", f"must be positive, got {self.row_length}")

    @property
    def protocol_names(self) -> list[str]:
        """The protocols as a list."""
        return [self.protocols] if isinstance(self.protocols, str) else list(self.protocols)

    def task(self, task: str | Task) -> Task:
        """The task of a name, or `task` itself.

        Raises:
          ConfigError: there is no such task, or an option is out of range for it.
          DataError: `data` has no folder for the task.
        """
        if isinstance(task, Task):
            return task
        return named_task(
            task, data=self.data, split=self.split, limit=self.limit, shots=self.shots
        )


def evaluate(
    base: str | Path | BaseModel,
    tasks: str | Sequence[str | Task],
    adapters: Mapping[str, str | Path | SavedAdapter] | None = None,
    *,
    with_base: bool = False,
    output: str | Path | None = None,
    revision: str | None = None,
    options: EvaluationOptions | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluates a base model, or adapters of it, on tasks.

    Tasks, tokenizer and adapters are checked before the weights of the base are read. If `output`
    holds an interrupted evaluation with the same arguments, it is resumed with identical results.

    Args:
      base: folder in the Hugging Face format, hub id, or result of `moe_jax.load_base`.
      tasks: names (`selection.task_names`) or tasks made in Python (`selection.template_task`).
      adapters: folders or loaded adapters, by their name in the results.
      with_base: evaluates the base alone too; without adapters this is always done.
      output: folder for the results and the answer to each question; None keeps them in memory.
      revision: revision of a hub id.
      options: data, protocols and computation; None is `EvaluationOptions()`.
      say: receives a line of progress for each model and task.

    Raises:
      UserError: an argument, the data or a checkpoint is invalid.
    """
    adapters, options = adapters or {}, options or EvaluationOptions()
    _check_names(adapters)
    task_list = [options.task(task) for task in ([tasks] if isinstance(tasks, str) else tasks)]
    if not task_list:
        raise FieldError("tasks", "none is given")
    require_distinct(task_list)

    files = open_base(base, revision)
    if files.unread_note is not None:
        say(files.unread_note)
    model = build_model(files, options.dtype)
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    loaded = load_adapters(adapters, files, model, mesh)
    plan = _plan(task_list, loaded, with_base or not loaded, files, options)
    folder = None if output is None else Path(output).expanduser()
    if folder is not None:
        names = [model_name(adapter) for adapter in plan.models]
        require_nothing_lost(folder, [task.name for task in task_list], names)
    with locked(folder) if folder is not None else contextlib.nullcontext():
        runs = plan.runs(folder, files, options.dtype)
        scorer = None
        if not all(run.journal.is_complete for run in runs):
            scorer = Scorer(
                model,
                load_params(files, model, mesh),
                batch_size=options.batch_size,
                row_length=options.row_length,
                mesh=mesh,
            )
        outcomes = []
        for run in runs:
            say(run.announcement)
            outcomes.append(run.outcome(scorer))
        settings = evaluation_settings(
            files, plan.models, task_list, plan.questions, plan.prepared, options.dtype
        )
        evaluation = Evaluation(settings, outcomes)
        if folder is not None:
            evaluation.save(folder)
    return evaluation


class _Run(NamedTuple):
    """One model on one task: its journal, announcement and computation."""

    journal: Journal
    announcement: str
    outcome: Callable[[Scorer | None], TaskOutcome]


class _Plan(NamedTuple):
    """Models and tokenized tasks of an evaluation.

    Attributes:
      language_models: adapters without a score head; None is the base alone.
      prepared: questions for the language models.
      labeled: classifiers, each with the rows of a task with its labels.
      questions: questions or rows by task name.
    """

    language_models: list[NamedAdapter | None]
    classifiers: list[NamedAdapter]
    prepared: list[PreparedTask]
    labeled: list[tuple[NamedAdapter, LabeledTask]]
    questions: dict[str, Sequence[Any]]

    @property
    def models(self) -> list[NamedAdapter | None]:
        return [*self.language_models, *self.classifiers]

    def runs(self, folder: Path | None, base: BaseModel, dtype: str) -> list[_Run]:
        """Opens the journals of all models and tasks."""
        runs = []
        for adapter in self.language_models:
            name, weights = model_name(adapter), None if adapter is None else adapter.adapter
            for task in self.prepared:
                journal = open_journal(folder, base, adapter, task, dtype)
                outcome = functools.partial(
                    answer_questions, model=name, adapter=weights, task=task, journal=journal
                )
                runs.append(_Run(journal, question_announcement(name, task, journal), outcome))
        for adapter, task in self.labeled:
            journal = open_classification_journal(folder, base, adapter, task, dtype)
            outcome = functools.partial(
                classify_rows, adapter=adapter, labeled=task, journal=journal
            )
            title = classification_announcement(adapter.name, task, journal)
            runs.append(_Run(journal, title, outcome))
        return runs


def _plan(
    tasks: Sequence[Task],
    adapters: Sequence[NamedAdapter],
    with_base: bool,
    base: BaseModel,
    options: EvaluationOptions,
) -> _Plan:
    """Reads and tokenizes the tasks for the models that are evaluated on them."""
    classifiers = [a for a in adapters if a.saved.method.classification is not None]
    language_models = [a for a in adapters if a.saved.method.classification is None]
    models = [*([None] if with_base else []), *language_models]
    questions = {task.name: task.questions() for task in tasks if models}
    methods = [None if adapter is None else adapter.saved.method for adapter in models]
    methods += [adapter.saved.method for adapter in classifiers]
    limits = base_limits(base.config, methods, options.truncate)
    tokenizer = load_extended_tokenizer(base.folder, base.config, methods)
    prepared = prepare_tasks(questions, options.protocol_names, tokenizer, limits)
    labeled = match_classifiers(
        classifiers, tasks, tokenizer, limits, has_language_model=bool(models)
    )
    rows = {task.task.name: task.rows for _, task in labeled}
    return _Plan(models, classifiers, prepared, labeled, {**rows, **questions})


def _check_names(adapters: Mapping[str, Any]) -> None:
    for name in adapters:
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is None or name == BASE:
            raise ConfigError(
                f"adapter {name!r}: its name must hold letters, digits, '_', '-' and '.' only, and "
                f"not be {BASE!r}; give it another with NAME=DIR"
            )
