"""`moe-jax evaluate`."""

import argparse
import sys

from moe_jax.commands import Run
from moe_jax.commands.arguments import (
    LESS_MEMORY_FLAGS,
    add_adapters,
    add_base,
    add_dtype,
    add_mesh,
    base_path,
    listed,
    mesh_config,
    named_folders,
)
from moe_jax.errors import ConfigError, memory_errors
from moe_jax.tasks.families import TASKS
from moe_jax.tasks.families.glue import ClassificationTask
from moe_jax.tasks.selection import task_names, template_task
from moe_jax.terminal import print_shown

EPILOG = """\
tasks:
  {tasks}

  Rows come from the hub, or with --data FOLDER from FOLDER/TASK/: .jsonl, .json or .parquet files
  with the columns of the hub's data set, named after their split (test.jsonl, validation.jsonl).

classifiers:
  An adapter trained with method.classification is evaluated on tasks with its labels, those of
  GLUE: {classified}. It predicts
  with its score head; other adapters and the base get the same rows as text (except stsb).

your own task:
  --own-task quiz.txt quiz.jsonl, where quiz.txt is a template for the rows of quiz.jsonl:

      Question: {{question}}
      {{options}}
      Answer:

  Each row then has a text `question`, a list `choices` and an `answer`: the text, the letter or
  the index from 0 of the correct choice. Other columns can be used in the same way; the sections
  `--- choices ---` and `--- answer ---` after the prompt name the columns of these two.

  With the template in FOLDER/quiz/template.txt, beside test.jsonl: --tasks quiz --data FOLDER.

metrics:
  label_acc   accuracy of the most likely label (A, B, true, ...) after a prompt with the options
  acc         accuracy of the most likely option after a prompt without them
  acc_norm    the same, with log-likelihoods divided by the number of characters of the option
  accuracy, f1, matthews, pearson, spearman
              metrics of classifiers, as in GLUE

output folder:
  results.json, results.md               accuracies, counts, standard errors
  predictions/MODEL/TASK.PROTOCOL.jsonl  prediction for each question; the same command resumes
                                         from these

example:
  moe-jax evaluate --base models/llama --adapter runs/mine/adapters/default --with-base \\
      --tasks arc_easy,boolq --limit 200 --output runs/mine/evaluation
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Measure the accuracy of a base, or of adapters on it, on tasks."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    classified = ", ".join(n for n in task_names() if issubclass(TASKS[n], ClassificationTask))
    parser.epilog = EPILOG.format(tasks=", ".join(task_names()), classified=classified)
    add_base(parser)
    parser.add_argument("--tasks", default="", metavar="A,B,...", help="tasks, listed below")
    parser.add_argument(
        "--own-task",
        nargs=2,
        action="append",
        default=[],
        metavar=("TEMPLATE", "DATA"),
        help="a task of your own, see below; may be given several times",
    )
    add_adapters(parser)
    parser.add_argument("--with-base", action="store_true", help="evaluate the base alone too")
    parser.add_argument("--data", metavar="FOLDER", help="read the tasks from here, not the hub")
    parser.add_argument("--split", help="split of the rows (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N rows of each task")
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
        help="rows computed side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--row-length",
        type=int,
        default=256,
        metavar="N",
        help="tokens of a row, into which questions are packed (default: %(default)s)",
    )
    add_dtype(parser)
    add_mesh(parser)
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="cut off the start of prompts that exceed the base's context; an error otherwise",
    )
    return _run


def _run(arguments: argparse.Namespace) -> None:
    # Imports the libraries of all tasks.
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
        row_length=arguments.row_length,
        truncate=arguments.truncate,
        mesh=mesh_config(arguments.mesh),
    )
    tasks = [options.task(name) for name in listed(arguments.tasks)]
    for template, data in arguments.own_task:
        tasks.append(template_task(template, data, split=split, limit=limit, shots=shots))
    if not tasks:
        raise ConfigError("--tasks: is missing; give tasks (--help lists them), or --own-task")
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
                say=lambda line: print_shown(line, file=sys.stderr),
            )
    except KeyboardInterrupt:
        result = "the same command resumes" if arguments.output else "no results are kept"
        print_shown(f"stopped; {result}", file=sys.stderr)
        sys.exit(130)
    print_shown(evaluation.to_markdown())
