"""`moe-jax surgery`."""

import argparse
import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import moe_jax
from moe_jax.commands import Run
from moe_jax.commands.arguments import (
    GROW_NOISE,
    MERGE_WEIGHTS,
    ROUTERS,
    TARGETS,
    UPCYCLE_TO,
    add_output,
    listed,
    numbers,
)
from moe_jax.errors import ConfigError
from moe_jax.terminal import print_shown

if TYPE_CHECKING:
    from moe_jax.surgery import SurgeryOutcome

EPILOG = """\
Each operation writes an adapter's folder and prints what is exact and what was measured. To train
the result further, set `adapters.NAME.start_from` in the configuration of a run.

examples:
  moe-jax surgery upcycle --adapter runs/lora/adapters/default --experts 8 --output upcycled
  moe-jax surgery from-dense --base models/llama --dense models/tuned --rank 16 --output extracted
  moe-jax surgery prune --adapter mixture --keep 4 --data text.txt --output pruned
  moe-jax surgery grow --adapter mixture --add 2 --data text.txt --output grown
  moe-jax surgery merge --adapter mixture --into 4 --data text.txt --output merged
"""


def add(parser: argparse.ArgumentParser) -> Run:
    """Change the experts of an adapter: upcycle a LoRA, prune, grow, merge; or extract a LoRA."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    operations = parser.add_subparsers(required=True, metavar="OPERATION")
    for name, add_operation in _OPERATIONS.items():
        text = inspect.cleandoc(add_operation.__doc__ or "")
        operation = operations.add_parser(name, help=text.splitlines()[0], description=text)
        operation.formatter_class = argparse.RawDescriptionHelpFormatter
        operation.set_defaults(operate=add_operation(operation))
    return _run


Operate: TypeAlias = Callable[[argparse.Namespace], "SurgeryOutcome"]


def _run(arguments: argparse.Namespace) -> None:
    outcome = arguments.operate(arguments)
    for note in outcome.notes:
        print_shown(note)
    method = outcome.adapter.method
    print_shown(f"wrote {arguments.output} ({type(method).registry.name_of(method)})")


def _upcycle(parser: argparse.ArgumentParser) -> Operate:
    """Turn a LoRA, rsLoRA or DoRA into experts, all of them copies of it.

    The output equals the LoRA's if the weights of a token's experts sum to one: with the routers
    top_k, soft, top_p with renormalise or top_p=1, and with switch if weights=straight_through,
    sparse_step=1 and no token exceeds its expert's capacity. Otherwise --data is required, and the
    change is measured on it.
    """
    _add_adapter(parser, "a LoRA")
    parser.add_argument(
        "--to", choices=UPCYCLE_TO, default="mixlora", help="the method (default: %(default)s)"
    )
    parser.add_argument(
        "--experts",
        required=True,
        metavar="N[,N,...]",
        help="number of experts; for mola also one number for each of equal groups of layers",
    )
    parser.add_argument(
        "--router",
        metavar="NAME[:FIELD=VALUE,...]",
        help=f"one of {', '.join(ROUTERS)}, for example top_p:top_p=0.8 (default: the method's)",
    )
    _add_seed(parser, "the routers")
    _add_data(parser, condition="if the result is not exact")
    fields = {"num_experts": "--experts", "router.name": "--router", "router": "--router"}
    new = {f"the new {to}.{name}": flag for to in UPCYCLE_TO for name, flag in fields.items()}
    parser.set_defaults(flags=fields | new)
    return lambda arguments: moe_jax.surgery.upcycle(
        arguments.adapter,
        arguments.to,
        num_experts=tuple(numbers(arguments.experts, "--experts")),
        router=None if arguments.router is None else _router(arguments.router),
        seed=arguments.seed,
        data=arguments.data,
        base=arguments.base,
        output=arguments.output,
    )


def _from_dense(parser: argparse.ArgumentParser) -> Operate:
    """Extract a LoRA from a fine-tuned model, by SVD of the differences from its base.

    It is exact if no difference exceeds the rank. The relative error of each module is printed, and
    with --data the KL divergence from the fine-tuned model.
    """
    parser.add_argument(
        "--base", required=True, metavar="DIR_OR_ID", help="base of the fine-tuned model"
    )
    parser.add_argument("--dense", required=True, metavar="DIR_OR_ID", help="fine-tuned model")
    parser.add_argument("--rank", type=int, required=True, metavar="N", help="rank of the LoRA")
    parser.add_argument(
        "--alpha",
        type=float,
        metavar="X",
        help="alpha of the LoRA; matters for further training only (default: the rank)",
    )
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        metavar="A,B,...",
        help="projections (default: %(default)s)",
    )
    parser.add_argument(
        "--leave-out",
        action="store_true",
        help="ignore differences elsewhere, in norms or embeddings; an error otherwise",
    )
    _add_seed(parser, "columns of A beyond the rank of the difference")
    _add_data(parser, base=False)
    add_output(parser)
    return lambda arguments: moe_jax.surgery.from_dense(
        arguments.base,
        arguments.dense,
        rank=arguments.rank,
        alpha=arguments.alpha,
        target_modules=listed(arguments.targets),
        leave_out=arguments.leave_out,
        seed=arguments.seed,
        data=arguments.data,
        output=arguments.output,
    )


def _prune(parser: argparse.ArgumentParser) -> Operate:
    """Keep the experts of each router that serve the most tokens of a text.

    With top_k, and with switch of weights=straight_through and a fixed capacity, the output on that
    text stays the same if no token chose a dropped expert. Otherwise the change is measured.
    """
    _add_adapter(parser, "a MixLoRA, LoRAMoE or MoLA")
    parser.add_argument(
        "--keep", type=int, required=True, metavar="N", help="number of experts to keep per router"
    )
    _add_data(parser, required=True)
    return lambda arguments: moe_jax.surgery.prune(
        arguments.adapter,
        arguments.keep,
        data=arguments.data,
        base=arguments.base,
        output=arguments.output,
    )


def _grow(parser: argparse.ArgumentParser) -> Operate:
    """Split experts into more, with a little noise.

    Without noise, --times is exact with top_k (whose top_k grows with it), soft, top_p=1, and
    switch of weights=straight_through and a fixed capacity; --add is exact with top_k=1 and that
    kind of switch. Otherwise the output changes, and the change is measured.
    """
    _add_adapter(parser, "a MixLoRA, LoRAMoE or MoLA")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--add", type=int, metavar="N", help="number of new experts per router")
    size.add_argument("--times", type=int, metavar="N", help="copies of each expert")
    parser.add_argument(
        "--split",
        default="",
        metavar="N,N,...",
        help="with --add: experts to split, counted from 0 (default: those with the largest load "
        "on --data)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=GROW_NOISE,
        metavar="X",
        help="noise on the new experts' weights and router columns, relative to their size "
        "(default: %(default)s)",
    )
    _add_seed(parser, "the noise")
    _add_data(parser, condition="if the result is not exact, and without --split")
    return lambda arguments: moe_jax.surgery.grow(
        arguments.adapter,
        add=arguments.add,
        times=arguments.times,
        split=numbers(arguments.split, "--split"),
        noise=arguments.noise,
        seed=arguments.seed,
        data=arguments.data,
        base=arguments.base,
        output=arguments.output,
    )


def _merge(parser: argparse.ArgumentParser) -> Operate:
    """Merge groups of experts: the mean of their weight updates, truncated to their rank.

    It is exact only if all experts are equal, as after upcycle. The error of the truncation and the
    change of the output are measured. Merging all experts into one gives a LoRA.
    """
    _add_adapter(parser, "a MixLoRA, LoRAMoE or MoLA, without DoRA")
    groups = parser.add_mutually_exclusive_group(required=True)
    groups.add_argument(
        "--into",
        type=int,
        metavar="N",
        help="number of experts per router; the most similar experts are merged first",
    )
    groups.add_argument(
        "--groups",
        metavar="N,N;N,N;...",
        help="groups of experts to merge, counted from 0, the same in all layers",
    )
    parser.add_argument(
        "--weights",
        choices=MERGE_WEIGHTS,
        default="average",
        help="weights of the experts of a group: equal, or by their load on --data "
        "(default: %(default)s)",
    )
    _add_seed(parser, "columns of A beyond the rank of the mean")
    _add_data(parser, required=True)
    return lambda arguments: moe_jax.surgery.merge(
        arguments.adapter,
        into=arguments.into,
        groups=None
        if arguments.groups is None
        else [numbers(group, "--groups") for group in arguments.groups.split(";")],
        weights=arguments.weights,
        data=arguments.data,
        seed=arguments.seed,
        base=arguments.base,
        output=arguments.output,
    )


_OPERATIONS: dict[str, Callable[[argparse.ArgumentParser], Operate]] = {
    "upcycle": _upcycle,
    "from-dense": _from_dense,
    "prune": _prune,
    "grow": _grow,
    "merge": _merge,
}


def _add_adapter(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument(
        "--adapter",
        type=Path,
        required=True,
        metavar="DIR_OR_ID",
        help=f"{kind}: folder, as in WORKDIR/adapters/NAME, or hub id",
    )
    add_output(parser)


def _add_seed(parser: argparse.ArgumentParser, subject: str) -> None:
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help=f"random seed of {subject} (default: 0)"
    )


def _add_data(
    parser: argparse.ArgumentParser,
    *,
    required: bool = False,
    condition: str = "",
    base: bool = True,
) -> None:
    """Adds --data, required always or on a condition, and --base."""
    parser.add_argument(
        "--data",
        type=Path,
        required=required,
        metavar="FILE",
        help="data to measure on, a file or folder as in training"
        + (f"; required {condition}".rstrip() if required or condition else ""),
    )
    if base:
        parser.add_argument(
            "--base",
            metavar="DIR_OR_ID",
            help="base, for the measurement (default: the path at training)",
        )


def _router(text: str) -> dict[str, Any]:
    """Parses `top_p:top_p=0.8,temperature=2.0` to the fields of a configuration."""
    name, _, rest = text.partition(":")
    fields: dict[str, Any] = {"name": name}
    for part in listed(rest):
        field, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"--router: expected FIELD=VALUE, got {part!r}")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value
    return fields
