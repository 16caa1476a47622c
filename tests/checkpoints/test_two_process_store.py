"""Digests of a state that two processes have written, and their agreement on an intact one."""

from pathlib import Path

from process_pair import run_pair

from moe_jax.files.digests import read_digests


def test_two_processes_agree_on_the_intact_state(tmp_path):
    states = tmp_path / "states"
    outputs = run_pair(Path(__file__).with_name("two_process_store.py"), states)
    # The step, and the number of lines said; Gloo prints lines of its own before.
    assert [out.splitlines()[-1] for out in outputs] == ["1 1", "1 0"]
    assert sorted(path.name for path in states.iterdir()) == ["1", "2.damaged"]
    shards = {name.split("/")[1] for name in read_digests(states / "1")}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= shards
