"""A step on packed rows equals the step on the same sequences in separate rows.

One program trains all kinds of adapters at once, on a model whose first layer has a sliding window.
"""

import jax
import numpy as np
import pytest
import tiny_program
from tolerances import FEW_OPERATIONS, GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.rows import divide_rows
from moe_jax.data.batch import Batch, TokenSequence, pack_rows, pad_rows
from moe_jax.training.step.loss import row_losses
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.step import forward

MODEL = tiny_program.model_config(
    num_layers=2, hidden_size=32, intermediate_size=56, num_heads=4, num_kv_heads=2,
    sliding_window=5, layer_types=("sliding_attention", "full_attention"),
)  # fmt: skip
LOSSES = {"load_balance": {"coefficient": 0.1}, "router_z": {"coefficient": 0.01}}
COMMON = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "up_proj")}
ROUTERS = {
    "top_k": {"name": "top_k", "top_k": 2},
    "top_p": {"name": "top_p", "top_p": 0.6},
    # Small enough that tokens overflow, and dependent on the length of the sequence.
    "switch": {"name": "switch", "capacity_factor": 0.5, "overflow": "frozen"},
    "soft": {"name": "soft"},
}
METHODS = {
    "lora": {"name": "lora", **COMMON},
    **{
        name: {"name": "mixlora", "num_experts": 4, "router": router, "losses": LOSSES, **COMMON}
        for name, router in ROUTERS.items()
    },
    "balanced": {
        "name": "loramoe",
        "num_experts": 4,
        **COMMON,
        "losses": {"localized_balance": {"coefficient": 0.5, "delta": 0.5}},
    },
}
LENGTHS = (16, 9, 12, 7)
"""Lengths of each adapter's sequences; each half makes a row of 25 tokens, or of 19 and padding."""


def _sequences(seed):
    rng = np.random.default_rng(seed)
    return [
        TokenSequence(
            tokens=rng.integers(0, 96, length).astype(np.int32),
            loss_mask=np.arange(length) >= length // 3,
            expert_group=number % 2,
        )
        for number, length in enumerate(LENGTHS)
    ]


SEQUENCES = {name: _sequences(seed) for seed, name in enumerate(METHODS)}
PADDED = join_rows([pad_rows(each, 4, (16,)) for each in SEQUENCES.values()])
PACKED = join_rows([pack_rows([each[:2], each[2:]], 25) for each in SEQUENCES.values()])
CONFUSED = PACKED._replace(segment_ids=np.minimum(PACKED.segment_ids, 1))


@pytest.fixture(scope="module")
def programs():
    make = lambda rows, packing: tiny_program.program(
        METHODS, rows=rows, config=MODEL, packing=packing, compute={"remat": "frozen"}
    )
    return {"padded": make(4, "none"), "packed": make(2, "first_fit")}


@pytest.fixture(scope="module")
def params(programs):
    return tiny_program.random_params(programs["padded"])


def _step(program, params, batch, adapters=None):
    """Metrics and gradients of a step, on random adapters by default."""
    before = jax.tree.map(np.array, adapters or tiny_program.random_adapters(program))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    state = jax.device_put(state.replace(adapters=before), program.state_shardings)
    state, metrics = program.train_step(state, params, batch)
    # SGD with learning rate 1 subtracts the gradient.
    lost = jax.tree.map(lambda old, new: old - np.array(new), before, state.adapters)
    return jax.tree.map(np.array, metrics), lost


@pytest.fixture(scope="module")
def steps(programs, params):
    """Metrics and gradients by kind of batch."""
    return {
        kind: _step(program, params, program.put_train_batch(batch))
        for kind, program, batch in (
            ("padded", programs["padded"], PADDED),
            ("packed", programs["packed"], PACKED),
            ("confused", programs["packed"], CONFUSED),
        )
    }


def test_gradients_of_all_leaves_equal_those_of_unpacked_rows(steps):
    (_, padded), (_, packed), (_, confused) = steps.values()
    for name in METHODS:
        leaves, _ = jax.tree_util.tree_flatten_with_path(packed[name])
        others = [jax.tree.leaves(tree[name]) for tree in (padded, confused)]
        for (path, ours), theirs, wrong in zip(leaves, *others, strict=True):
            where = f"{name} {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(ours, theirs, **GRADIENT_ROUNDING, err_msg=where)
            assert np.abs(ours).max() > 1e-5, where
            # Sequences that attend to each other give other gradients.
            assert np.abs(ours - wrong).max() > 1e-2 * np.abs(ours).max(), where


def test_a_mesh_makes_the_same_step_as_one_device(programs, steps):
    # Every sequence twice, in both orders: equal means, and a different row on each of the four
    # devices. Other adapters do not matter.
    names = ("top_k", "balanced")
    mesh = {"data": 2, "fsdp": 2}
    program = tiny_program.program(
        {name: METHODS[name] for name in names},
        rows=4, config=MODEL, packing="first_fit", compute={"remat": "frozen"},
        mesh=mesh, devices=4,
    )  # fmt: skip
    rows = {
        name: [lengths[:2], lengths[2:], lengths[1::-1], lengths[:1:-1]]
        for name, lengths in SEQUENCES.items()
    }
    batch = program.put_train_batch(join_rows([pack_rows(rows[name], 25) for name in names]))
    assert {shard.data.shape for shard in batch.tokens.addressable_shards} == {(1, 2, 25)}
    adapters = tiny_program.random_adapters(programs["packed"])
    adapters = {name: adapters[name] for name in names}
    metrics, gradients = _step(program, tiny_program.random_params(program), batch, adapters)

    expected_metrics, expected = steps["packed"]
    for name in ("loss", "load_balance", "localized_balance", "grad_norm"):
        with_suffix = {metric for metric in metrics if metric.endswith(f"/{name}")}
        assert with_suffix, name
        for metric in with_suffix:
            np.testing.assert_allclose(
                metrics[metric], expected_metrics[metric], **ROUNDING, err_msg=metric
            )
    for name in names:
        jax.tree.map(
            lambda ours, one: np.testing.assert_allclose(ours, one, **GRADIENT_ROUNDING),
            gradients[name],
            expected[name],
        )


def test_metrics_equal_those_of_unpacked_rows(steps):
    (padded, _), (packed, _), (confused, _) = steps.values()
    assert packed.keys() == padded.keys()
    for metric in padded:
        if metric != "padding_share":
            np.testing.assert_allclose(packed[metric], padded[metric], **ROUNDING, err_msg=metric)
    for metric in ("lora/loss", "top_k/loss", "switch/overflow", "balanced/localized_balance"):
        assert abs(packed[metric] - confused[metric]) > 1e-4, metric
    assert 0.05 < packed["switch/overflow"] < 0.95
    assert packed["lora/sequences"] == len(LENGTHS)
    assert packed["tokens"] == sum(LENGTHS) * len(METHODS)
    np.testing.assert_allclose(packed["padding_share"], 1 - 44 / 50, **FEW_OPERATIONS)
    np.testing.assert_allclose(padded["padding_share"], 1 - 44 / 64, **FEW_OPERATIONS)


def test_losses_by_sequence(programs, params):
    program, name = programs["packed"], "switch"
    (method,) = (segment.method for segment in program.adapter_rows if segment.name == name)
    adapters = {name: tiny_program.random_adapters(program)[name]}

    def logits(batch, *, packed):
        model = program.model.clone(
            adapter_rows=divide_rows({name: method}, {name: len(batch.tokens)})
        )
        run = lambda *args: forward(model, *args, tiny_program.logits_head, packed=packed)[0]
        return np.array(jax.jit(run)(params, adapters, batch))

    padded = pad_rows(SEQUENCES[name], 4, (16,))
    packed = pack_rows([SEQUENCES[name][:2], SEQUENCES[name][2:]], 25)
    expected, _ = row_losses(logits(padded, packed=False), padded)
    ours, actual = logits(packed, packed=True), []
    for row, ids in enumerate(packed.segment_ids):
        for segment in range(1, ids.max() + 1):
            place = (slice(row, row + 1), ids == segment)
            (loss,), _ = row_losses(ours[place], Batch(*(array[place] for array in packed)))
            actual.append(loss)
    np.testing.assert_allclose(actual, expected, **ROUNDING)


def test_programs_for_unpacked_rows_ignore_segment_ids(programs, params, steps):
    """The causal mask suffices for them, and is cheaper."""
    program = programs["padded"]
    batch = program.put_train_batch(PADDED)
    cut = np.where(PADDED.positions > 3, 2, 1) * PADDED.segment_ids
    cut = jax.device_put(cut[None], batch.segment_ids.sharding)
    metrics, _ = _step(program, params, batch._replace(segment_ids=cut))
    jax.tree.map(np.testing.assert_array_equal, metrics, steps["padded"][0])


def test_packed_rows_need_a_packed_program(programs):
    with pytest.raises(ValueError, match="single sequence, padded on the right only"):
        programs["padded"].put_train_batch(PACKED)
    # Evaluation rows are never packed.
    with pytest.raises(ValueError, match="single sequence, padded on the right only"):
        programs["packed"].put_eval_batch(PACKED)
