"""`moe-jax evaluate`."""

import argparse
import sys

from moe_jax.commands import Run
from moe_jax.commands.arguments import (
    LESS_MEMORY_FLAGS,
    add_adapters,
    add_dtype,
    add_mesh,
    base_path,
    listed,
    mesh_config,
    named_folders,
    numbers,
)
from moe_jax.errors import ConfigError
from moe_jax.tasks.families import TASKS
from moe_jax.tasks.families.glue import ClassificationTask
from moe_jax.tasks.selection import own_task, task_names

EPILOG = """\
tasks:
  {tasks}

  Rows come from the hub, or with --data FOLDER from FOLDER/TASK/: .jsonl, .json or .parquet files
  with the columns of the hub's data set, named after their split (test.jsonl, validation.jsonl).

classifiers:
  An adapter trained with method.classification is measured on the tasks with its labels, those of
  GLUE: {classified}. Its score head
  answers; other adapters and the base are asked the same rows in words (stsb cannot be).

your own task:
  --own-task quiz.txt quiz.jsonl, where quiz.txt says how a row of quiz.jsonl is asked, for example

      Question: {{question}}
      {{options}}
      Answer:

  Each row then has a text `question`, a list `choices` and an `answer`: the text, the letter or
  the index from 0 of the right choice. Other columns can be named the same way; the sections
  `--- choices ---` and `--- answer ---` after the prompt say where these two are to be found.

  Kept as template.txt in FOLDER/quiz/ beside test.jsonl, it is --tasks quiz --data FOLDER.

measures:
  label_acc   the prompt lists the options; which label (A, B, true, ...) is likeliest next
  acc         it does not; which option's words are likeliest after it
  acc_norm    the same, the log-likelihood divided by the option's number of characters
  accuracy, f1, matthews, pearson, spearman
              of a classifier's labels or numbers, as GLUE measures each task

what it leaves in the output folder:
  results.json, results.md             accuracies, counts, standard errors
  predictions/MODEL/TASK.PROTOCOL.jsonl  what the model said to each question; the same command
                                         again goes on from here

example:
  moe-jax evaluate --base models/llama --adapter runs/mine/adapters/default --with-base \\
      --tasks arc_easy,boolq --limit 200 --output runs/mine/evaluation
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Measure how well a base, or adapters on it, answer the questions of tasks."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    classified = ", ".join(n for n in task_names() if issubclass(TASKS[n], ClassificationTask))
    parser.epilog = EPILOG.format(tasks=", ".join(task_names()), classified=classified)
    parser.add_argument(
        "--base",
        help="folder in the Hugging Face format, or hub id (default: the adapter's own)",
    )
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--tasks", default="", metavar="A,B,...", help="names, listed below")
    parser.add_argument(
        "--own-task",
        nargs=2,
        action="append",
        default=[],
        metavar=("TEMPLATE", "DATA"),
        help="a task of your own, see below; may be given several times",
    )
    add_adapters(parser)
    parser.add_argument(
        "--with-base", action="store_true", help="evaluate the base without an adapter too"
    )
    parser.add_argument("--data", metavar="FOLDER", help="read the tasks from here, not the hub")
    parser.add_argument("--split", help="another split than the task's own")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each task")
    parser.add_argument(
        "--shots", type=int, metavar="N", help="answered examples before each question (mmlu: 5)"
    )
    parser.add_argument(
        "--protocols",
        default="labels,choices",
        metavar="A,B",
        help="labels gives label_acc, choices gives acc and acc_norm (default: both)",
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the results; resumes from it")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="sequences at once; the logits need N x length x vocabulary x 4 bytes (default: 16)",
    )
    parser.add_argument(
        "--buckets",
        default="",
        metavar="N,N,...",
        help="lengths to pad to, one compilation each (default: 32, 64, ... up to the context)",
    )
    add_dtype(parser)
    add_mesh(parser)
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut the start off prompts longer than the base's context; they are refused otherwise",
    )
    return _run


def _run(arguments: argparse.Namespace) -> None:
    # With libraries that other commands do not need.
    from moe_jax.errors import memory_errors
    from moe_jax.evaluation.model_evaluation import EvaluationOptions, evaluate

    split, limit, shots = arguments.split, arguments.limit, arguments.shots
    options = EvaluationOptions(
        data=arguments.data,
        split=split,
        limit=limit,
        shots=shots,
        protocols=listed(arguments.protocols),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        buckets=numbers(arguments.buckets, "--buckets"),
        truncate=arguments.truncate,
        mesh=mesh_config(arguments.mesh),
    )
    tasks = [options.task(name) for name in listed(arguments.tasks)]
    for template, data in arguments.own_task:
        tasks.append(own_task(template, data, split=split, limit=limit, shots=shots))
    if not tasks:
        raise ConfigError("--tasks: none is given; --help lists them")
    adapters = named_folders(arguments.adapter)
    base = base_path(arguments.base, adapters, arguments.revision)
    try:
        with memory_errors(f"a smaller --batch-size, {LESS_MEMORY_FLAGS}"):
            evaluation = evaluate(
                base,
                tasks,
                adapters,
                with_base=arguments.with_base,
                output=arguments.output,
                revision=arguments.revision,
                options=options,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
    except KeyboardInterrupt:
        kept = "the same command goes on from here" if arguments.output else "nothing is kept"
        print(f"stopped; {kept}", file=sys.stderr)
        sys.exit(130)
    print(evaluation.to_markdown())
