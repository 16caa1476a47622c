"""Evaluation of the adapters of a training run on tasks, with the run's own base and mesh."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.evaluation import EvaluationConfig
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.errors import ConfigError, error_prefix
from moe_jax.evaluation.answer_journal import Journal, locked
from moe_jax.evaluation.evaluation_results import RESULTS_FILE, Evaluation, evaluation_settings
from moe_jax.evaluation.outcomes import Accuracy, MetricScore
from moe_jax.evaluation.question_runner import (
    answer_questions,
    model_name,
    open_journal,
    question_announcement,
)
from moe_jax.evaluation.scorer import Scorer
from moe_jax.evaluation.scoring_protocols import (
    PreparedTask,
    base_limits,
    prepare_tasks,
)
from moe_jax.files.json_file import parse_json
from moe_jax.loaded.inference_model import BASE, Adapter, NamedAdapter, load_adapters
from moe_jax.processes.agreement import require_agreement
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.task import Question, Task
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.step.program import Program

CONFIGS_FIELD = "evaluation"
"""Field of `results.json` with the `EvaluationConfig` of each adapter."""

_REPLACEABLE = ("adapter", "items", "dtype")
"""Fields of a journal that may differ: a run may have been extended, or given other questions."""


class TrainingTaskEvaluation:
    """Factory of `TrainingTaskEvaluator`s; implements `training.run.measurement.TaskEvaluation`."""

    def is_done(self, config: RunConfig, steps: Mapping[str, int], folder: Path) -> bool:
        """True if `folder` has the results of the final evaluation of `config`."""
        try:
            results = parse_json((folder / RESULTS_FILE).read_bytes())
            evaluated = {
                model["name"]: model["step"] for model in results["models"] if model["adapter"]
            }
            configs = results[CONFIGS_FIELD]
        except (OSError, ValueError, TypeError, KeyError):
            return False  # no results, or those of a command
        expected = _plain_configs(config)
        return configs == expected and evaluated == {name: steps[name] for name in expected}

    def prepare(
        self, config: RunConfig, inputs: Inputs, program: Program
    ) -> "TrainingTaskEvaluator":
        """Makes the evaluator of a run; see `TrainingTaskEvaluator`."""
        return TrainingTaskEvaluator(config, inputs, program)


class TrainingTaskEvaluator:
    """Evaluates the adapters of a run on their tasks, during training and at its end.

    Compiled programs are kept, so that later evaluations compile nothing.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, program: Program):
        """Reads and tokenizes the tasks; needs no weights.

        Args:
          config: configuration of the run.
          inputs: base of the run.
          program: model and mesh of the run.

        Raises:
          ConfigError: adapters have conflicting settings for a task, no protocol applies to a task,
            or an adapter's name is reserved.
          DataError: the data cannot be read or does not fit the base.
        """
        self._config = config
        self._base = inputs.base
        self._model = program.model
        self._mesh = program.mesh
        self._configs: dict[str, EvaluationConfig] = _evaluation_configs(config)
        self._scorers: dict[tuple[int, int], Scorer] = {}
        self._tasks: dict[str, Task] = {}
        self._questions: dict[str, list[Question]] = {}
        self._prepared: dict[EvaluationConfig, list[PreparedTask]] = {}
        methods = [adapter.method for adapter in config.adapters.values()]
        base = self._base
        tokenizer = load_extended_tokenizer(base.folder, base.config, methods)
        for name, evaluation in self._configs.items():
            field = f"config.adapters.{name}"
            if name == BASE:
                raise ConfigError(
                    f"{field}: is the name of the base in results; rename the adapter"
                )
            with error_prefix(f"{field}.evaluation"):
                self._read_tasks(evaluation)
                if evaluation not in self._prepared:
                    evaluated = [*methods, *([None] if evaluation.with_base else [])]
                    limits = base_limits(base.config, evaluated, evaluation.truncate)
                    questions = {task: self._questions[task] for task in evaluation.tasks}
                    self._prepared[evaluation] = prepare_tasks(
                        questions, evaluation.protocols, tokenizer, limits
                    )

    def measure(
        self, name: str, tree: Any, params: Any, stop: Callable[[], bool]
    ) -> dict[str, Accuracy | MetricScore]:
        """Evaluates adapter `name` during training; see `training.run.measurement.TaskEvaluator`.

        `params` must be the same arrays in each call.

        Raises:
          EvaluationInterrupted: `stop` returned true.
          ConfigError: a score is not finite.
        """
        evaluation = self._configs[name]
        adapter = Adapter(self._config.adapters[name].method, tree)
        limit = evaluation.limit_between
        limit = evaluation.limit if limit is None else limit
        outcomes = []
        for task in self._prepared[evaluation]:
            task = task._replace(questions=task.questions[:limit])
            journal = Journal(None, {}, len(task.questions))
            scorer = self._scorer(evaluation, params)
            outcomes.append(answer_questions(scorer, name, adapter, task, journal, stop))
        return Evaluation({}, outcomes).scores(name)

    def finish(
        self,
        adapters: Mapping[str, Path],
        params: Any,
        folder: Path,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Evaluation:
        """Evaluates all adapters after training; see `training.run.measurement.TaskEvaluator`.

        `folder` receives the answer to each question. The caller saves the results.

        Raises:
          EvaluationInterrupted: `stop` returned true.
          ConfigError: a score is not finite, or `folder` has the answers of another evaluation.
        """
        folders: dict[str, Any] = {name: adapters[name] for name in self._configs}
        loaded = load_adapters(folders, self._base, self._model, self._mesh)
        dtype, outcomes = _dtype(self._config), []
        with locked(folder):
            runs = [
                (adapter, config, task, self._open_journal(folder, adapter, task, dtype))
                for adapter, config, task in self._model_tasks(loaded)
            ]
            require_agreement({"the answers so far": [len(run[-1].records) for run in runs]}, say)
            for adapter, config, task, journal in runs:
                name, weights = model_name(adapter), None if adapter is None else adapter.adapter
                say(question_announcement(name, task, journal))
                scorer = self._scorer(config, params)
                outcomes.append(answer_questions(scorer, name, weights, task, journal, stop))
        with_base = any(adapter is None for adapter, *_ in runs)
        settings = evaluation_settings(
            self._base,
            [*([None] if with_base else []), *loaded],
            list(self._tasks.values()),
            self._questions,
            [task for tasks in self._prepared.values() for task in tasks],
            dtype,
        )
        return Evaluation({**settings, CONFIGS_FIELD: _plain_configs(self._config)}, outcomes)

    def _open_journal(
        self, folder: Path, adapter: NamedAdapter | None, task: PreparedTask, dtype: str
    ) -> Journal:
        return open_journal(folder, self._base, adapter, task, dtype, _REPLACEABLE)

    def _read_tasks(self, evaluation: EvaluationConfig) -> None:
        """Reads the tasks that no earlier adapter has."""
        for name in evaluation.tasks:
            task = named_task(
                name,
                data=self._config.tasks_folder,
                split=evaluation.split,
                limit=evaluation.limit,
                shots=evaluation.shots,
            )
            if self._tasks.setdefault(name, task) != task:
                raise ConfigError(
                    f"task {name!r} has another split, limit or number of shots than for other "
                    "adapters, so that a table could not compare them; give all the same"
                )
            if name not in self._questions:
                self._questions[name] = task.questions()

    def _model_tasks(
        self, adapters: Sequence[NamedAdapter]
    ) -> Iterator[tuple[NamedAdapter | None, EvaluationConfig, PreparedTask]]:
        """Models with their tasks: first the base with the tasks of all `with_base` adapters."""
        seen = set[tuple[str, str]]()
        for evaluation in self._configs.values():
            for task in self._prepared[evaluation] if evaluation.with_base else ():
                if (task.name, task.protocol) not in seen:
                    seen.add((task.name, task.protocol))
                    yield None, evaluation, task
        for adapter in adapters:
            evaluation = self._configs[adapter.name]
            yield from ((adapter, evaluation, task) for task in self._prepared[evaluation])

    def _scorer(self, evaluation: EvaluationConfig, params: Any) -> Scorer:
        key = (evaluation.batch_size, evaluation.row_length)
        if key not in self._scorers:
            self._scorers[key] = Scorer(
                self._model,
                params,
                batch_size=evaluation.batch_size,
                row_length=evaluation.row_length,
                mesh=self._mesh,
            )
        return self._scorers[key]


def _evaluation_configs(config: RunConfig) -> dict[str, EvaluationConfig]:
    """Evaluation settings of the adapters that have any."""
    configs = {name: adapter.evaluation for name, adapter in config.adapters.items()}
    return {name: evaluation for name, evaluation in configs.items() if evaluation is not None}


def _plain_configs(config: RunConfig) -> dict[str, Any]:
    return {name: to_plain(evaluation) for name, evaluation in _evaluation_configs(config).items()}


def _dtype(config: RunConfig) -> str:
    """Dtypes of computation and weights, as one word if they are equal."""
    compute, weights = config.compute.dtype, config.base.param_dtype
    return compute if compute == weights else f"{compute}, weights {weights}"
