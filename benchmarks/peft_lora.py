"""Child process that trains peft's LoRA, started and controlled by `peft_process.py`.

    python benchmarks/peft_lora.py FOLDER

FOLDER has the weights, the tokens and `settings.json`. Each line on standard input runs a step and
prints a line of JSON with its seconds and loss. Needs torch, transformers, peft and numpy, but
neither jax nor the package.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
import transformers

from benchmarks.torch_llama import ArrayFolder, copy_pairs, target_modules, torch_llama


def adapted_model(folder: Path, settings: dict[str, Any]) -> Any:
    """Builds the frozen model with LoRA on all seven projections, from the given weights."""
    arrays = ArrayFolder(folder)
    device, dtype = settings["device"], settings["dtype"]
    base = torch_llama(settings["model"], arrays, dtype, device)
    if settings["remat"]:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        rank_pattern=settings["rank_pattern"],
        target_modules=[name for _, name in target_modules()],
        lora_dropout=0.0,
    )
    model = peft.get_peft_model(base, config)
    copy_pairs(model, arrays)
    return model.train()


def step_of(model: Any, tokens: torch.Tensor, settings: dict[str, Any]) -> Callable[[], float]:
    """Returns a function that runs one training step, waits for it and returns the loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings["learning_rate"], weight_decay=0.0)
    dtype, micro = getattr(torch, settings["dtype"]), settings["micro_batches"]
    autocast = torch.autocast(
        settings["device"], dtype=dtype, enabled=dtype != torch.float32, cache_enabled=True
    )

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=tokens.device)
        for rows in tokens.chunk(micro):
            with autocast:
                loss = model(input_ids=rows, labels=rows).loss / micro
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, settings["clip_norm"])
        optimizer.step()
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()
        return total.item()

    return step


def answer(**fields: Any) -> None:
    """Prints the fields as a line of JSON."""
    print(json.dumps(fields), flush=True)


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        answer(refused=f"the torch of {sys.executable} has no CUDA, and jax runs on a GPU")
        return
    # peft reads an attribute that transformers has deprecated.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    torch.set_num_threads(settings["threads"])
    try:
        model = adapted_model(folder, settings)
        tokens = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int64))
        step = step_of(model, tokens.to(settings["device"]), settings)
        trainable = sum(w.numel() for w in model.parameters() if w.requires_grad)
        modules = (torch, transformers, peft)
        versions = {module.__name__: module.__version__ for module in modules}
        answer(trainable=trainable, threads=torch.get_num_threads(), versions=versions)
        for _ in sys.stdin:
            start = time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - start
            cuda = settings["device"] == "cuda"
            peak = torch.cuda.max_memory_allocated() if cuda else None
            answer(seconds=seconds, loss=loss, peak_bytes=peak)
    except (torch.OutOfMemoryError, MemoryError) as error:
        answer(failed=f"out of memory: {error}")


if __name__ == "__main__":
    main()
