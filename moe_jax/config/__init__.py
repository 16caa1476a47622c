"""Configuration: frozen dataclasses and the strict parser that builds them.

A configuration file has a function `get_config()` that returns nested groups of fields:

    base                     path, revision, param_dtype (how the frozen weights are kept)
    compute                  dtype, attention (xla or cudnn), block_tokens, remat (none, dots,
                             frozen, narrow, full: what the backward pass recomputes)
    adapters.NAME.method     name, rank, alpha, dropout, target_modules, rslora, dora,
                             classification; for experts also num_experts, router, losses; for
                             MixLoRA expert_lora, ffn_dropout (see `moe_jax.adapters`)
    adapters.NAME.data       train, validation, max_length, buckets (shorter row lengths: less
                             padding, one compilation each), packing (several rows of a data set in
                             one: next to none)
    adapters.NAME.optimizer  name, learning_rate, schedule, weight_decay, clip_norm,
                             lora_plus_ratio (B's learning rate over A's)
    adapters.NAME.evaluation tasks, every, limit, protocols, with_base
    adapters.NAME            batch_size (rows of one optimiser step, over all devices and
                             micro-batches), start_from; steps, epochs and seed where they differ
                             from those of training
    training                 steps or epochs, micro_batches (gradient accumulation),
                             max_batch_rows, seed, log_every, eval_every
    mesh                     data, fsdp, tensor: devices along each axis; -1 takes the rest
    checkpoints              every, keep
    logging                  tensorboard, wandb_project
    sweep                    adapter, grid: adapters made of one, for each combination of values
    only                     which of the adapters train; None trains all
    tasks_folder             where the rows of tasks are, if not on the hub

Each group is a dataclass in this folder, whose docstring has all of its fields. Unknown fields are
refused, with the nearest known name.
"""
