"""Training states are restored exactly, and damaged or different ones are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from damage import FAULTS, cut, files_below, refusal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.checkpoints.store import (
    ITEMS,
    TrainingStore,
    latest_step,
    newest_intact_step,
    read_metadata,
    set_aside,
)
from moe_jax.errors import CheckpointError, TrainingError
from moe_jax.files.digests import read_digests, write_digests

FILES_OF_A_STEP = 20


def make_adapters(seed=0):
    key = jax.random.key(seed)
    return {
        "default": {"layers": {"lora_A": jax.random.normal(key, (2, 8, 4)), "gate": jnp.ones(3)}}
    }


def make_optimizer(adapters):
    transform = optax.multi_transform(
        {
            "train": optax.apply_if_finite(optax.chain(optax.clip(1.0), optax.adamw(1e-3)), 5),
            "frozen": optax.set_to_zero(),
        },
        {"default": {"layers": {"lora_A": "train", "gate": "frozen"}}},
    )
    return {"step": jnp.int32(7), "opt_state": transform.init(adapters), "loss_scale": {}}


def abstract(tree):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        named_leaves(expected).items(), jax.tree.leaves(actual), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(other), np.asarray(leaf), err_msg=path)
        assert other.dtype == leaf.dtype


def save(store, step, adapters, **metadata):
    store.save(
        step,
        adapters=adapters,
        optimizer=make_optimizer(adapters),
        data={"default": {"next_index": step}},
        metadata=metadata,
    )


@pytest.fixture
def adapters():
    return make_adapters()


@pytest.fixture
def saved(tmp_path, adapters):
    with TrainingStore(tmp_path / "states", every=1, keep=3) as store:
        save(store, 3, make_adapters(1))
        save(store, 4, adapters, window=[{"loss": float("nan")}, {"loss": 0.1 + 0.2}])
    return tmp_path / "states"


def open_store(folder):
    return TrainingStore(folder, every=1, keep=3)


def test_round_trip(saved, adapters):
    optimizer = make_optimizer(adapters)
    with open_store(saved) as store:
        state = store.restore(4, abstract(adapters), abstract(optimizer))
    assert_equal(state.adapters, adapters)
    assert_equal(state.optimizer, optimizer)
    assert state.step == 4
    assert state.data == {"default": {"next_index": 4}}
    nan, number = (step["loss"] for step in state.metadata["window"])
    assert np.isnan(nan)
    assert number == 0.1 + 0.2  # to the last bit


def test_adapters_load_without_the_optimizer(saved, adapters):
    shutil.rmtree(saved / "4" / "optimizer")
    with open_store(saved) as store:
        assert_equal(store.restore_adapters(4, abstract(adapters)), adapters)


def test_every_and_keep(tmp_path, adapters):
    with TrainingStore(tmp_path, every=3, keep=2) as store:
        for step in range(1, 13):
            if store.due(step):
                save(store, step, adapters)
        assert not store.due(12), "a step that is there is not saved twice"
        save(store, 12, adapters)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [9, 12]
    assert latest_step(tmp_path) == 12


def test_save_is_independent_of_later_steps(tmp_path):
    # The next step overwrites the buffers in place while the save is still being written.
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    adapters = {"default": {"w": jnp.arange(500_000, dtype=jnp.float32)}}
    expected = np.asarray(adapters["default"]["w"]).copy()
    with TrainingStore(tmp_path, every=1, keep=1) as store:
        store.save(1, adapters=adapters, optimizer={"step": jnp.int32(1)}, data={}, metadata={})
        target = abstract(adapters)
        for _ in range(3):
            adapters = double(adapters)
        jax.block_until_ready(adapters)
        store.wait()
        restored = store.restore_adapters(1, target)
    np.testing.assert_array_equal(restored["default"]["w"], expected)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (4, 8)])
def test_restore_on_another_mesh(tmp_path, devices, before, after):
    def sharding(count):
        return NamedSharding(Mesh(np.array(devices[:count]), ("x",)), PartitionSpec("x"))

    values = np.arange(16, dtype=np.float32)
    array = jax.device_put(values, sharding(before))
    with TrainingStore(tmp_path, every=1, keep=1) as store:
        optimizer = {"step": jnp.int32(1)}
        store.save(1, adapters={"a": {"w": array}}, optimizer=optimizer, data={}, metadata={})
        store.wait()
        target = {"a": {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding(after))}}
        restored = store.restore_adapters(1, target)["a"]["w"]
    np.testing.assert_array_equal(restored, values)
    assert restored.sharding == sharding(after)


def leaf(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"lora_A": leaf(2, 8, 4)}, "holds unexpected arrays: 'default/layers/gate'"),
        (
            {"lora_A": leaf(2, 8, 4), "gate": leaf(3), "lora_B": leaf(2), "more": leaf(2)},
            "has no array for 'default/layers/lora_B' and 1 more",
        ),
        (
            {"lora_A": leaf(2, 8, 5), "gate": leaf(3)},
            "'default/layers/lora_A' has shape (2, 8, 4) and type float32, expected (2, 8, 5)",
        ),
        (
            {"lora_A": leaf(2, 8, 4), "gate": leaf(3, dtype=jnp.bfloat16)},
            "'default/layers/gate' has shape (3,) and type float32, expected (3,) and bfloat16",
        ),
    ],
)
def test_different_leaves_are_refused(saved, target, words):
    with open_store(saved) as store, pytest.raises(CheckpointError) as error:
        store.restore_adapters(4, {"default": {"layers": target}})
    assert words in str(error.value)
    assert str(saved / "4" / "adapters") in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_saved(saved, adapters, bad):
    adapters["default"]["layers"]["gate"] = jnp.array([1.0, bad, 1.0])
    with open_store(saved) as store:
        with pytest.raises(TrainingError) as error:
            save(store, 5, adapters)
        store.wait()
        assert store.kept_state() == "the state at step 4 is kept"
    assert "'default/layers/gate' are not finite at step 5" in str(error.value)
    assert sorted(p.name for p in saved.iterdir()) == ["3", "4"]


def test_an_incomplete_step_is_ignored_and_removed(saved, adapters):
    half = saved / "5.orbax-checkpoint-tmp" / "adapters.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    (half / "part").write_bytes(b"\0" * 100)
    assert latest_step(saved) == 4
    with open_store(saved) as store:
        assert store.latest == 4
        save(store, 5, adapters)
        store.wait()
        assert_equal(store.restore_adapters(5, abstract(adapters)), adapters)
    assert sorted(p.name for p in saved.iterdir()) == ["3", "4", "5"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # late errors
@pytest.mark.parametrize("fault", FAULTS)
def test_every_damaged_file_is_seen(saved, adapters, fault):
    """Before anything is restored; and what restores all the same is what was saved."""
    optimizer = make_optimizer(adapters)

    def require_saved(state):
        assert_equal(state.adapters, adapters)
        assert_equal(state.optimizer, optimizer)
        assert state.data == {"default": {"next_index": 4}}

    digested = sorted(read_digests(saved / "4"))
    assert {name.partition("/")[0] for name in digested} == set(ITEMS)
    files = files_below(saved / "4")
    assert len(files) >= FILES_OF_A_STEP
    with open_store(saved) as store:
        for file in files:
            name, content = file.relative_to(saved / "4").as_posix(), file.read_bytes()
            if not content and fault == "flip":
                continue
            FAULTS[fault](file)
            step, damage = newest_intact_step(saved)
            if name in digested and (content or fault == "remove"):
                problem = "is missing" if fault == "remove" else "differs from its digest"
                assert (step, damage) == (3, {4: f"{name} {problem}"})
            elif name == "digests.json":
                assert step == 3
                assert damage[4].startswith("digests.json is ")
            else:  # empty before, or the note that the commit succeeded, which nothing reads
                assert (step, damage) == (4, {})
            message = refusal(
                lambda: store.restore(4, abstract(adapters), abstract(optimizer)), require_saved
            )
            assert message is None or f"delete {saved / '4'} to resume from step 3" in message
            assert message is not None or name not in ("data/metadata", "metadata/metadata")
            file.write_bytes(content)
    assert newest_intact_step(saved) == (4, {})


def test_a_damaged_state_is_set_aside(saved, adapters):
    (saved / "4.damaged").mkdir()
    cut(saved / "4" / "data" / "metadata")
    step, damage = newest_intact_step(saved)
    assert (step, damage) == (3, {4: "data/metadata differs from its digest"})
    assert set_aside(saved, 4) == saved / "4.damaged"
    with open_store(saved) as store:
        assert store.latest == 3
        save(store, 4, adapters)
        save(store, 5, adapters)
        store.wait()
    assert sorted(path.name for path in saved.iterdir()) == ["3", "4", "4.damaged", "5"]
    assert newest_intact_step(saved) == (5, {})


def test_items_that_are_not_needed_are_not_checked(saved):
    cut(next(path for path in files_below(saved / "4" / "optimizer") if path.stat().st_size))
    assert newest_intact_step(saved)[0] == 3
    assert newest_intact_step(saved, ("adapters", "metadata")) == (4, {})
    shutil.rmtree(saved / "4")
    (saved / "3" / "data" / "metadata").unlink()
    assert newest_intact_step(saved) == (None, {3: "data/metadata is missing"})
    assert newest_intact_step(saved / "none") == (None, {})


def test_a_missing_item_is_reported(saved, adapters):
    shutil.rmtree(saved / "4" / "data")
    with open_store(saved) as store, pytest.raises(CheckpointError, match="data/metadata"):
        store.restore(4, abstract(adapters), abstract(make_optimizer(adapters)))


def test_another_format_version_is_refused(saved):
    file = saved / "4" / "metadata" / "metadata"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    write_digests(saved / "4", ITEMS)
    with pytest.raises(CheckpointError, match="format version 99, this release reads 2"):
        read_metadata(saved, 4)


def test_a_renamed_state_is_refused(saved):
    (saved / "4").rename(saved / "6")
    with pytest.raises(CheckpointError, match="6 holds the state of step 4; rename it back"):
        read_metadata(saved, 6)


def test_latest_step_without_states(tmp_path):
    assert latest_step(tmp_path / "absent") is None
    assert latest_step(tmp_path) is None
