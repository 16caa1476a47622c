"""Times of training steps on one GPU, for `benchmarks/gpu.py`: of this library, and of peft."""

import concurrent.futures
import functools
import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.gpu_results import Recorder

TIMED = 8
"""Timed rounds of a group, fewer where time runs out."""

DEFAULTS = {
    "size": "7b",
    "vocab": None,
    "rows": 4,
    "length": 2048,
    "micro_batches": 1,
    "rank": 16,
    "experts": 8,
    "top_k": 2,
    "dtype": "bfloat16",
    "param_dtype": None,
    "attention": "cudnn",
    "remat": "frozen",
    "expert_kernel": "einsum",
    "mesh": None,
    "dropout": 0.0,
}
"""Settings of a step; those of a case differ by what the case names, and by options of XLA."""

TINY = {"size": "tiny", "length": 64, "attention": "xla", "expert_kernel": "einsum"}
"""Settings that replace those of every case with `--tiny`."""

Case = tuple[str, Mapping[str, Any]]
Group = Sequence[Case]
"""Methods and what differs from `DEFAULTS`, timed in turns."""

METHODS = ("mixlora", "lora", "frozen")
ROWS = (4, 1, 8)
"""The most important first, although steps of one row have no peak memory after those of four."""

STEPS: tuple[Group, ...] = tuple([(method, {"rows": rows}) for method in METHODS] for rows in ROWS)
ANCHOR: tuple[Group, ...] = (
    [(method, {"size": "8b", "rows": 2, "length": 4096}) for method in METHODS],
)
FUSED = {"expert_kernel": "fused"}
VARIANTS: tuple[Group, ...] = (
    [("mixlora", FUSED), ("mixlora", {}), ("lora", {})],
    [("mixlora", {**FUSED, "rows": 1}), ("mixlora", {"rows": 1}), ("lora", {"rows": 1})],
    [("mixlora", {"attention": "xla", "rows": 1}), ("mixlora", {"rows": 1})],
    [("mixlora", {"dropout": 0.05}), ("lora", {"dropout": 0.05}), ("mixlora", {})],
    [("mixlora", {"xla_gpu_enable_dynamic_slice_fusion": on}) for on in (True, False)],
    [("mixlora", {"xla_gpu_dot_merger_threshold_mb": mb, "rows": 1}) for mb in (4, 32)],
    [("mixlora", {"remat": remat}) for remat in ("frozen", "dots", "full")],
)
NF4: tuple[Group, ...] = ([(method, {"param_dtype": "nf4"}) for method in ("mixlora", "lora")],)


def measure_steps(recorder: Recorder, groups: Sequence[Group]) -> None:
    """Compiles the steps of each group in threads, and times them in turns."""
    import jax

    from benchmarks.random_inputs import params_of
    from benchmarks.report import machine
    from moe_jax.compiled.matrix_rate import MatrixProduct

    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    recorder.write(machine=machine(), memory_limit=limit)
    product = MatrixProduct("bfloat16", [device])
    rate = statistics.median(product.flops / product.seconds() for _ in range(5))
    recorder.write(matrix_product_tflops=rate / 1e12, width=product.width)
    params: dict[tuple[str, str | None], Any] = {}
    for group in groups:
        if recorder.left() < 30:
            recorder.write(error="no time left", case=[method for method, _ in group])
            continue
        with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
            futures = [
                pool.submit(recorder.attempt, case, functools.partial(_compile, recorder, *case))
                for case in group
            ]
        made_steps = [(index, future.result()) for index, future in enumerate(futures)]
        compiled = [(index, made) for index, made in made_steps if made is not None]
        running: dict[int, Any] = {}
        # The device knows its highest peak only: a step after one with a higher peak has none.
        for index, (step, row, settings) in sorted(compiled, key=lambda c: c[1][1]["planned_gib"]):
            key = (settings.size, settings.param_dtype)
            if key not in params:
                params.clear()  # one base at a time
                params[key] = params_of(step.program)
            begin = functools.partial(_begin, step, params[key], row)
            begun = recorder.attempt(row["case"], begin)
            if begun is not None:
                running[index] = (begun, row, [])
        _time_in_turns(recorder, dict(sorted(running.items())), rate)


def measure_variants(recorder: Recorder) -> None:
    """Compares the forms of MixLoRA's experts on one layer, and times steps of all variants."""
    from benchmarks.expert_kernels import measure

    sizes = (70, 130, 1) if recorder.args.tiny else (8192, 11008, TIMED)
    compared = recorder.attempt("expert kernels", lambda: measure(*sizes))
    if compared is not None:
        recorder.write(expert_kernels=compared)
    measure_steps(recorder, VARIANTS)


def _compile(recorder: Recorder, method: str, differs: Mapping[str, Any]) -> Any:
    """A compiled step, its line of results so far, and its settings."""
    from benchmarks.training_steps import compiled_step
    from moe_jax.compiled.estimate import program_memory

    settings = Namespace(**{**DEFAULTS, **differs, **(TINY if recorder.args.tiny else {})})
    step = compiled_step(method, settings)
    options = {name: value for name, value in differs.items() if name.startswith("xla_")}
    memory = program_memory(step.compile({} if recorder.args.tiny else options))
    row = {
        "case": [method, dict(differs)],
        "settings": vars(settings),
        "compile_seconds": round(step.compile_seconds, 1),
        "planned_gib": memory.peak / 2**30,
    }
    return step, row, settings


def _begin(step: Any, params: Any, row: dict[str, Any]) -> Callable[[], float]:
    """Creates the inputs of a compiled step and runs it once; writes its peak memory to `row`."""
    import jax

    from moe_jax.compiled.estimate import program_memory

    device = jax.devices()[0]
    run = step.begin(step, params)
    before = device.memory_stats() or {}
    run()
    arguments = program_memory(step.compiled).arguments
    row["peak_gib"] = peak_gib(arguments, before, device.memory_stats() or {})
    return run


def peak_gib(arguments: int, before: Mapping[str, int], after: Mapping[str, int]) -> float | None:
    """Peak memory of a program on a device, in GiB; None if an earlier peak was higher.

    Args:
      arguments: bytes of the program's arguments, which are on the device before and after.
      before: `Device.memory_stats` before the program ran; empty where the device has none.
      after: the same afterwards.
    """
    peak = "peak_bytes_in_use"
    if after.get(peak, 0) <= before.get(peak, 0):
        return None
    return (arguments + after[peak] - before["bytes_in_use"]) / 2**30


def _time_in_turns(recorder: Recorder, running: dict[int, Any], rate: float) -> None:
    from benchmarks.sizes import model_of
    from benchmarks.timing import seconds_of
    from benchmarks.training_steps import needed_of_frozen

    for turn in range(-1, TIMED):  # the first is not timed, nor was that of `_begin`
        if turn > 2 and recorder.left() < 10:
            break
        for index, (run, row, samples) in list(running.items()):
            seconds = recorder.attempt(row["case"], lambda run=run: seconds_of(run))
            if seconds is None:
                del running[index]
            elif turn >= 0:
                samples.append(seconds)
    for _, row, samples in running.values():
        settings, seconds = row["settings"], statistics.median(samples)
        tokens = settings["rows"] * settings["length"]
        needed = needed_of_frozen(model_of(settings["size"]), settings["rows"], settings["length"])
        recorder.write(
            **row,
            seconds=seconds,
            range=[min(samples), max(samples)],
            tokens_per_second=tokens / seconds,
            needed_tflops=needed / seconds / 1e12,
            needed_share=needed / seconds / rate,
        )


def measure_peft(recorder: Recorder) -> None:
    """Times peft's LoRA of as many weights, on random weights made on the device."""
    import peft
    import torch
    import transformers

    from benchmarks.peft_lora import step_of
    from benchmarks.sizes import hf_fields, model_of
    from benchmarks.timing import seconds_of
    from benchmarks.training_steps import OPTIMIZER, needed_of_frozen

    device = "cuda" if torch.cuda.is_available() else "cpu"
    recorder.write(versions={m.__name__: m.__version__ for m in (torch, peft, transformers)})
    settings = DEFAULTS | (TINY if recorder.args.tiny else {})
    model, length = model_of(settings["size"]), settings["length"]
    config = transformers.LlamaConfig(**hf_fields(model), use_cache=False)
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    ffn = dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), settings["rank"] * settings["experts"]
    )
    lora = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=16,
        rank_pattern=ffn,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", *ffn],
    )
    adapted = peft.get_peft_model(base, lora).train()
    for rows in ROWS:
        for checkpointed in (False, True):
            case = ["peft", {"rows": rows, "checkpointed": checkpointed}]
            if recorder.left() < 10:
                recorder.write(case=case, error="no time left")
                continue
            if checkpointed:
                base.gradient_checkpointing_enable()
                base.enable_input_require_grads()
            else:
                base.gradient_checkpointing_disable()
            tokens = torch.randint(0, config.vocab_size, (rows, length), device=device)
            options = {
                "learning_rate": OPTIMIZER["learning_rate"],
                "dtype": "bfloat16",
                "micro_batches": 1,
                "device": device,
                "clip_norm": 1.0,
            }

            def measured(tokens: Any = tokens, options: Any = options) -> list[float]:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                step = step_of(adapted, tokens, options)
                return [seconds_of(step) for _ in range(2 + TIMED)][2:]

            samples = recorder.attempt(case, measured)
            if device == "cuda":
                torch.cuda.empty_cache()
            if samples is None:
                continue
            seconds = statistics.median(samples)
            recorder.write(
                case=case,
                seconds=seconds,
                range=[min(samples), max(samples)],
                tokens_per_second=rows * length / seconds,
                needed_tflops=needed_of_frozen(model, rows, length) / seconds / 1e12,
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
            )
