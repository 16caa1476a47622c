"""Losses and metrics of TRL's preference trainers, on a model and a batch that are given.

The trainers are made on a data set of two rows, which they never read: only their losses are
called.
"""

import collections
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "simpo": (CPOTrainer, CPOConfig),
}


def trainer(
    kind: str,
    model: torch.nn.Module,
    reference: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    **settings: Any,
) -> Any:
    """TRL's trainer of a kind of loss, in float64 where the model is."""
    trainer_class, config_class = TRAINERS[kind]
    rows: dict[str, list] = {"prompt": ["a"] * 2}
    if kind == "kto":
        rows |= {"completion": ["b", "c"], "label": [True, False]}
        settings |= {"train_sampling_strategy": "sequential"}
    else:
        rows |= {"chosen": ["b", "b"], "rejected": ["c", "c"]}
    if kind == "simpo":
        settings |= {"loss_type": "simpo", "cpo_alpha": settings.get("cpo_alpha", 0.0)}
    arguments = config_class(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        **settings,
    )
    frozen = {"ref_model": reference} if kind in ("dpo", "kto") else {}
    return trainer_class(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        **frozen,
    )


def loss_and_metrics(made: Any, kind: str, batch: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss of a trainer, and its metrics under its own names.

    Args:
      made: from `trainer`.
      kind: kind of its loss.
      batch: our batch of rows, the two of an example one after the other.
    """
    first, second = (_rows(batch, start) for start in (0, 1))
    if kind in ("orpo", "simpo"):
        inputs = {}
        for name, rows in (("chosen", first), ("rejected", second)):
            inputs[f"{name}_input_ids"] = rows["input_ids"]
            inputs[f"{name}_attention_mask"] = rows["attention_mask"]
            inputs[f"{name}_labels"] = rows["input_ids"].masked_fill(
                rows["completion_mask"] == 0, -100
            )
            inputs[f"prompt_{'input_ids' if name == 'chosen' else 'attention_mask'}"] = rows[
                "attention_mask"
            ]
        loss, metrics = made.get_batch_loss_metrics(made.model, inputs)
        return loss, {name: float(value) for name, value in metrics.items()}
    if kind == "kto":
        inputs = first | {f"KL_{name}": tensor for name, tensor in second.items()}
        inputs["label"] = torch.tensor(batch.labels[::2].sum(axis=1) > 0)
    else:
        inputs = {name: torch.cat([first[name], second[name]]) for name in first}
    made._metrics.clear()
    mode = "train" if made.model.training else "eval"
    made._metrics |= {mode: collections.defaultdict(list)}
    loss = made.compute_loss(made.model, inputs)
    return loss, {name: values[-1] for name, values in made._metrics[mode].items()}


def _rows(batch: Any, start: int) -> dict[str, torch.Tensor]:
    arrays = {
        "input_ids": batch.tokens,
        "attention_mask": batch.segment_ids,
        "completion_mask": batch.loss_mask,
    }
    return {
        name: torch.tensor(np.asarray(array[start::2])).long() for name, array in arrays.items()
    }
