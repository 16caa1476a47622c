"""The evaluation of a training run's adapters on tasks, on the run's own base and mesh."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.config.evaluation import EvaluationConfig
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError, named
from moe_jax.evaluation.answer_journal import Journal, locked
from moe_jax.evaluation.evaluation_results import RESULTS, Accuracy, Evaluation, Metric
from moe_jax.evaluation.question_runner import (
    announcement,
    answer,
    model_name,
    open_journal,
    settings,
)
from moe_jax.evaluation.scorer import Scorer, complete_buckets
from moe_jax.evaluation.scoring_protocols import BaseLimits, PreparedTask, ask, max_candidates
from moe_jax.loaded.model import BASE, Adapter, NamedAdapter, load_adapters
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.task import Question, Task
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.step.program import Program

ASKED_FOR = "evaluation"
"""The field of `results.json` that holds each adapter's `EvaluationConfig`."""

_ANEW = ("adapter", "items", "dtype")
"""A run that was made longer, or asks for other questions now, does not refuse at its very end."""


class OnTasks:
    """What `train.py` hands to training; see `training.on_tasks.EvaluationOfTasks`."""

    def is_done(self, config: RunConfig, steps: Mapping[str, int], folder: Path) -> bool:
        """Whether `folder` has the results of the evaluation that `config` asks for at the end."""
        try:
            found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
            ends = {model["name"]: model["step"] for model in found["models"] if model["adapter"]}
            asked_for = found[ASKED_FOR]
        except (OSError, ValueError, TypeError, KeyError):
            return False  # there are none, or somebody else's
        own = _asked_for(config)
        return asked_for == own and ends == {name: steps[name] for name in own}

    def prepare(self, config: RunConfig, inputs: Inputs, program: Program) -> "TaskEvaluator":
        """See `TaskEvaluator`."""
        return TaskEvaluator(config, inputs, program)


class TaskEvaluator:
    """Asks the adapters of a run the questions of their tasks.

    What it compiles is kept, so that later measurements compile nothing.
    """

    def __init__(self, config: RunConfig, inputs: Inputs, program: Program):
        """Reads the tasks and turns them into ids; needs no weights.

        Args:
          config: the run's configuration.
          inputs: its base.
          program: its model and mesh.

        Raises:
          ConfigError: adapters disagree about a task, a task fits no protocol, an adapter's name is
            taken, or there are several processes.
          DataError: the data cannot be used, or does not fit the base.
        """
        self._config = config
        self._base = inputs.base
        self._model = program.model
        self._mesh = program.mesh
        self._own: dict[str, EvaluationConfig] = _evaluations(config)
        self._scorers: dict[tuple[int, tuple[int, ...]], Scorer] = {}
        self._tasks: dict[str, Task] = {}
        self._questions: dict[str, list[Question]] = {}
        self._asked: dict[EvaluationConfig, list[PreparedTask]] = {}
        if jax.process_count() > 1:
            raise ConfigError(
                f"config.adapters.{next(iter(self._own))}.evaluation: several processes cannot "
                "evaluate yet; leave it out, and run `moe-jax evaluate` on the adapter afterwards"
            )
        tokenizer = load_tokenizer(inputs.base.folder)
        for name, own in self._own.items():
            field = f"config.adapters.{name}"
            if name == BASE:
                raise ConfigError(f"{field}: results call the base so; give it another name")
            with named(f"{field}.evaluation"):
                self._read(own)
                if own not in self._asked:
                    limits = BaseLimits(
                        inputs.base.config.vocab_size,
                        inputs.base.config.max_position_embeddings,
                        own.truncate,
                    )
                    questions = {task: self._questions[task] for task in own.tasks}
                    self._asked[own] = ask(questions, own.protocols, tokenizer, limits)
        self._candidates = max_candidates([a for asked in self._asked.values() for a in asked])

    def measure(
        self, name: str, tree: Any, params: Any, stop: Callable[[], bool]
    ) -> dict[str, Accuracy | Metric]:
        """How adapter `name` does while it trains; see `training.on_tasks.Evaluator`.

        `params` are the same ones at each call.

        Raises:
          Stopped: `stop` said so.
          ConfigError: a score is not finite.
        """
        own = self._own[name]
        adapter = Adapter(self._config.adapters[name].method, tree)
        limit = own.limit if own.limit_between is None else own.limit_between
        outcomes = []
        for one in self._asked[own]:
            few = one._replace(prepared=one.prepared[:limit])
            journal = Journal(None, {}, len(few.prepared))
            outcomes.append(answer(self._scorer(own, params), name, adapter, few, journal, stop))
        return Evaluation({}, outcomes).shares(name)

    def finish(
        self,
        adapters: Mapping[str, Path],
        params: Any,
        folder: Path,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Evaluation:
        """How all adapters do at the end; see `training.on_tasks.Evaluator`.

        `folder` gets the answer to each question; the results are left to the caller.

        Raises:
          Stopped: `stop` said so.
          ConfigError: a score is not finite, or `folder` has the answers of something else.
        """
        folders: dict[str, Any] = {name: adapters[name] for name in self._own}
        loaded = load_adapters(folders, self._base, self._model, self._mesh)
        dtype, outcomes = _dtype(self._config), []
        with locked(folder):
            runs = [
                (one, own, asked, open_journal(folder, self._base, one, asked, dtype, _ANEW))
                for one, own, asked in self._whom_to_ask(loaded)
            ]
            for one, own, asked, journal in runs:
                name, adapter = model_name(one), None if one is None else one.adapter
                say(announcement(name, asked, journal))
                scorer = self._scorer(own, params)
                outcomes.append(answer(scorer, name, adapter, asked, journal, stop))
        said = settings(
            self._base,
            [*([None] if any(one is None for one, *_ in runs) else []), *loaded],
            list(self._tasks.values()),
            self._questions,
            [one for own in self._asked.values() for one in own],
            dtype,
        )
        return Evaluation({**said, ASKED_FOR: _asked_for(self._config)}, outcomes)

    def _read(self, own: EvaluationConfig) -> None:
        """Reads the tasks of one adapter that no other one has."""
        for name in own.tasks:
            task = named_task(
                name,
                data=self._config.tasks_folder,
                split=own.split,
                limit=own.limit,
                shots=own.shots,
            )
            known = self._tasks.setdefault(name, task)
            if known != task:
                raise ConfigError(
                    f"other adapters are asked other questions of {name!r}, so that a table could "
                    "not compare them; give all the same split, limit and shots"
                )
            if name not in self._questions:
                self._questions[name] = task.questions()

    def _whom_to_ask(
        self, loaded: Sequence[NamedAdapter]
    ) -> Iterator[tuple[NamedAdapter | None, EvaluationConfig, PreparedTask]]:
        """Whom to ask what, by whose settings; the base what adapters want it to be asked."""
        seen = set[tuple[str, str]]()
        for own in self._own.values():
            for asked in self._asked[own] if own.with_base else ():
                if (asked.task, asked.protocol) not in seen:
                    seen.add((asked.task, asked.protocol))
                    yield None, own, asked
        for one in loaded:
            own = self._own[one.name]
            yield from ((one, own, asked) for asked in self._asked[own])

    def _scorer(self, own: EvaluationConfig, params: Any) -> Scorer:
        buckets = complete_buckets(own.buckets, self._base.config.max_position_embeddings)
        key = (own.batch_size, buckets)
        if key not in self._scorers:
            self._scorers[key] = Scorer(
                self._model,
                params,
                batch_size=own.batch_size,
                buckets=buckets,
                candidates=self._candidates,
                mesh=self._mesh,
            )
        return self._scorers[key]


def _evaluations(config: RunConfig) -> dict[str, EvaluationConfig]:
    """Of the adapters that have one."""
    own = {name: adapter.evaluation for name, adapter in config.adapters.items()}
    return {name: evaluation for name, evaluation in own.items() if evaluation is not None}


def _asked_for(config: RunConfig) -> dict[str, Any]:
    return {name: to_plain(own) for name, own in _evaluations(config).items()}


def _dtype(config: RunConfig) -> str:
    """What `moe-jax evaluate --dtype` calls the types that are computed and kept in."""
    computed, kept = config.compute.dtype, config.base.param_dtype
    return computed if computed == kept else f"{computed}, weights {kept}"
