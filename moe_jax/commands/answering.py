"""What `moe-jax generate` does, once its flags are read."""

import argparse
import sys

from moe_jax.commands.answers import Shown, Wanted, Written, check_output
from moe_jax.commands.arguments import base_path, mesh_config, named_folders, unescaped
from moe_jax.commands.interactive import Talk
from moe_jax.commands.prompt_files import GivenPrompt, read_prompts
from moe_jax.errors import ConfigError
from moe_jax.inference.api import InferenceSession
from moe_jax.inference.decoding import SamplingConfig
from moe_jax.inference.prompts import Prompt, PromptEncoder, PromptFormat
from moe_jax.inference.text_generator import GenerationConfig
from moe_jax.loaded.model import BASE


def run(arguments: argparse.Namespace) -> None:
    """Answers what the flags ask for.

    Raises:
      UserError: what is wrong with them, before the base's weights are read.
    """
    _check_choice(arguments)
    adapters = named_folders(arguments.adapter)
    if BASE in adapters:
        raise ConfigError(f"--adapter: {BASE!r} is the base's name; give another with NAME=DIR")
    config = _config(arguments)
    prompt_format = PromptFormat(arguments.chat, arguments.system, arguments.template)
    given = _given(arguments)
    session = InferenceSession.open(
        base_path(arguments.base, adapters, arguments.revision),
        adapters,
        revision=arguments.revision,
        dtype=arguments.dtype,
        mesh=mesh_config(arguments.mesh),
    )
    encoder = session.encoder(prompt_format)
    names = [*([None] if arguments.with_base or not adapters else []), *adapters]
    if arguments.interactive:
        session.require_language_models()
        Talk(session, encoder, prompt_format, config, names[0]).run()
        return
    wanted = [
        Wanted(number, one, name)
        for number, one in enumerate(given)
        for name in ([one.adapter] if one.has_adapter else names)
    ]
    prompts = [Prompt(_tokens(encoder, one.given), one.adapter, one.given.where) for one in wanted]
    session.check(prompts, config)
    is_chat = arguments.chat or any(one.messages is not None for one in given)
    try:
        if arguments.output is not None:
            with Written(arguments.output, wanted, config.samples) as written:
                generator = session.text_generator(is_chat=is_chat)
                for answers in generator.answers(prompts, config, arguments.batch_size):
                    written.add(answers)
        elif len(prompts) == config.samples == 1:
            for piece in session.text_generator(is_chat=is_chat).stream(prompts[0], config):
                print(piece.text, end="", flush=True)
            print()
        else:
            shown = Shown(wanted, config.samples)
            generator = session.text_generator(is_chat=is_chat)
            for answers in generator.answers(prompts, config, arguments.batch_size):
                shown.add(answers)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def _check_choice(arguments: argparse.Namespace) -> None:
    choices = {
        "--prompt": bool(arguments.prompt),
        "--prompts": arguments.prompts is not None,
        "--interactive": arguments.interactive,
    }
    chosen = [flag for flag, is_given in choices.items() if is_given]
    if len(chosen) != 1:
        raise ConfigError(
            f"give one of {', '.join(choices)}; got {' and '.join(chosen) or 'none of them'}"
        )
    if arguments.interactive and (arguments.output is not None or arguments.samples != 1):
        raise ConfigError("--interactive: goes without --output and --samples")
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size: must be positive, got {arguments.batch_size}")
    if arguments.output is not None:
        check_output(arguments.output)


def _config(arguments: argparse.Namespace) -> GenerationConfig:
    sampling = SamplingConfig(
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.min_p,
        arguments.repetition_penalty,
    )
    return GenerationConfig(
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        samples=arguments.samples,
        stop=tuple(map(unescaped, arguments.stop)),
        seed=arguments.seed,
    )


def _given(arguments: argparse.Namespace) -> list[GivenPrompt]:
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts.expanduser())
    several = len(arguments.prompt) > 1
    return [
        GivenPrompt(f"--prompt {number}" if several else "--prompt", text)
        for number, text in enumerate(arguments.prompt, 1)
    ]


def _tokens(encoder: PromptEncoder, given: GivenPrompt) -> tuple[int, ...]:
    if given.messages is not None:
        return encoder.conversation(given.messages, given.where)
    return encoder.text(given.text, given.where, given.material)
