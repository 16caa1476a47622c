"""Recorded reference values: all weights map to our tree, and gradients have their shapes."""

import numpy as np
import pytest
from moe_peft_oracle import CASES, as_tree, load_case

LAYERS, WIDTH, FFN, KV, EXPERTS, RANK = 2, 64, 128, 32, 4, 4
PLAIN = {"lora_A", "lora_B"}


def leaves(tree, prefix=""):
    for name, node in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(node, dict):
            yield from leaves(node, path)
        else:
            yield path, node


@pytest.mark.parametrize("name", CASES)
def test_all_values_map_to_weights(name):
    case = load_case(name)
    weights = dict(leaves(as_tree(case.weights)))
    assert sum(a.size for a in weights.values()) == sum(a.size for a in case.weights.values())
    for prefix in ("full/grad", "full/aux_grad"):
        if prefix == "full/aux_grad" and "full/aux_loss" not in case:
            continue
        found = dict(leaves(as_tree(case.group(prefix))))
        assert {p: a.shape for p, a in found.items()} == {p: a.shape for p, a in weights.items()}
    trained = dict(leaves(as_tree(case.group("traj_w"))))
    assert len(trained) == 2
    assert all(
        0 < np.abs(after - weights[path]).max() < 0.01 and after.shape == weights[path].shape
        for path, after in trained.items()
    )


@pytest.mark.parametrize(
    ("name", "q_proj", "up_proj"),
    [
        ("lora", PLAIN, PLAIN),
        ("dora", PLAIN | {"magnitude"}, PLAIN | {"magnitude"}),
        ("mixlora", PLAIN, PLAIN),
        ("loramoe", PLAIN, PLAIN | {"router"}),
        ("mola", PLAIN | {"router"}, PLAIN | {"router"}),
    ],
)
def test_shapes_in_our_tree(name, q_proj, up_proj):
    layers = as_tree(load_case(name).weights)["layers"]
    ffn = layers["mlp"]
    if name == "mixlora":
        assert set(ffn) == {"moe"}
        ffn = ffn["moe"]
        assert ffn["router"]["kernel"].shape == (LAYERS, WIDTH, EXPERTS)
    assert set(layers["self_attn"]["q_proj"]) == q_proj
    assert set(ffn["up_proj"]) == up_proj
    routed = () if name in ("lora", "dora") else (EXPERTS,)
    assert ffn["up_proj"]["lora_A"].shape == (LAYERS, WIDTH, *routed, RANK)
    assert ffn["up_proj"]["lora_B"].shape == (LAYERS, *routed, RANK, FFN)
    routed = routed if name == "mola" else ()
    assert layers["self_attn"]["k_proj"]["lora_B"].shape == (LAYERS, *routed, RANK, KV)
    if "router" in up_proj:
        assert ffn["down_proj"]["router"]["kernel"].shape == (LAYERS, FFN, EXPERTS)
    if name == "dora":
        assert ffn["up_proj"]["magnitude"].shape == (LAYERS, FFN)


def test_experts_and_matrices_are_in_place():
    weights = load_case("mola").weights
    up = as_tree(weights)["layers"]["mlp"]["up_proj"]
    key = "mola.layers.1.mlp.up_proj.experts.2"
    np.testing.assert_array_equal(up["lora_A"][1, :, 2], weights[f"{key}.lora_A.weight"].T)
    np.testing.assert_array_equal(up["lora_B"][1, 2], weights[f"{key}.lora_B.weight"].T)


def test_router_logits_are_split_by_site():
    for name in ("mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola"):
        sites = load_case(name).router_logits()
        assert {site.shape for site in sites.values()} == {(LAYERS, 4, 24, EXPERTS)}


def test_unknown_keys_and_missing_experts():
    weights = load_case("mixlora").weights
    with pytest.raises(ValueError, match="not a key"):
        as_tree({**weights, "mixlora.layers.0.mlp.up_proj.experts.0.lora_C.weight": np.zeros(1)})
    short = {key: value for key, value in weights.items() if ".experts.1." not in key}
    with pytest.raises(ValueError, match=r"has \[0, 2, 3\]"):
        as_tree(short)
