"""A record of training, with something in every field."""

from moe_jax.checkpoints.training_record import DataSet, TrainingRecord

PICTURES = {"loss.png": b"\x89PNG of losses", "experts.png": b"\x89PNG of experts"}


def example_record() -> TrainingRecord:
    """Record with a value in every field, as in `data/adapter_format/training_record_5.json`."""
    words = DataSet(
        path="/home/someone/data/words.jsonl",
        on_hub=False,
        schema="completion",
        task=None,
        split="train",
        revision=None,
        weight=2.0,
        rows=100,
    )
    more = DataSet(
        path="owner/rows",
        on_hub=True,
        schema="text",
        task=None,
        split="train",
        revision="v1",
        weight=1.0,
        rows=20,
    )
    held_out = DataSet(
        path="",
        on_hub=False,
        schema="task",
        task="boolq",
        split="validation",
        revision=None,
        weight=1.0,
        rows=11,
    )
    return TrainingRecord(
        package_version="0.1.0",
        adapter="default",
        method={"name": "lora", "rank": 4},
        base={"path": "some/base", "revision": "main", "param_dtype": "bfloat16"},
        compute_dtype="float32",
        optimizer={"name": "adamw", "learning_rate": 0.001, "schedule": {"kind": "cosine"}},
        preference={"name": "dpo", "beta": 0.1},
        batch_size=8,
        micro_batches=2,
        max_length=24,
        packing="first_fit",
        train_on_prompt=False,
        seed=3,
        start_from="/home/someone/upcycled",
        step=7,
        total_steps=30,
        train={"words": words, "more": more},
        validation={"held_out": held_out},
        training_loss=1.25,
        validation_losses={"held_out": 1.5},
        validation_metrics={"held_out": {"accuracy": 0.75, "f1": None}},
        best_loss=1.4,
        best_accuracy=0.75,
        accuracies={"boolq": {"label_acc": 0.5, "acc": 0.625}, "arc_easy": {"acc": 0.25}},
        accuracies_step=5,
    )
