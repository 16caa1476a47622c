"""Ranks that give adapters the size of others, against sums worked out by hand.

A layer of `tiny_program.model_config` has for each unit of rank, as inputs plus outputs:

    q, o 48 + 48 each    k, v 48 + 16 each    gate, up, down 48 + 80 each    in all 704

and there are three layers.
"""

import dataclasses
import json
from typing import Any

import flax.linen as nn
import pytest
from one_device import one_device
from tiny_program import ALL_TARGETS, LORA, MIXLORA, model_config
from tiny_run import read_config, write_inputs

from moe_jax.adapters import METHODS
from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.leaves import checksums
from moe_jax.config.rank_match import parse_method
from moe_jax.errors import ConfigError
from moe_jax.loaded.rank_match import match_ranks
from moe_jax.loaded.run_adapters import resolve_adapter
from moe_jax.training.run.loop import train

LORA_PER_RANK = 3 * 704
# Attention pairs of rank 4, three projections with four experts of rank 4, and the router.
MIXLORA_SIZE = 3 * (4 * 320 + 4 * 4 * 384 + 48 * 4)
TOP_2 = {"name": "top_k", "top_k": 2}


def matched(**methods: dict[str, Any]) -> Any:
    given = {name: parse_method(fields, METHODS, name) for name, fields in methods.items()}
    return match_ranks(given, model_config())


def method_like(name: str, rank: Any, **fields: Any) -> dict[str, Any]:
    return {"name": name, "rank": rank, "alpha": 8.0, "target_modules": ALL_TARGETS, **fields}


def test_lora_of_the_size_of_mixlora():
    assert MIXLORA_SIZE == 22_848  # 10.82 times LoRA of rank 1
    ranks = matched(lora=method_like("lora", "match:mix", alpha="2*rank"), mix=MIXLORA)
    assert (ranks.methods["lora"].rank, ranks.methods["lora"].alpha) == (11, 22.0)
    assert list(ranks.methods) == ["lora", "mix"]
    assert ranks.notes == {"lora": "rank 11: 23,232 parameters, nearest to the 22,848 of 'mix'"}


@pytest.mark.parametrize(
    ("fields", "per_rank", "fixed"),
    [
        ({"name": "lora"}, 704, 0),
        ({"name": "lora", "dora": True}, 704, 48 + 16 + 16 + 48 + 80 + 80 + 48),
        ({"name": "lora", "classification": {"labels": ("a", "b")}}, 704, 2 * 48 / 3),
        ({"name": "mixlora", "num_experts": 2, "router": TOP_2}, 320 + 2 * 384, 2 * 48),
        (  # only the pairs on attention follow
            {
                "name": "mixlora",
                "num_experts": 2,
                "router": TOP_2,
                "expert_lora": {"rank": 3},
            },
            320,
            3 * 2 * 384 + 2 * 48,
        ),
        ({"name": "loramoe", "num_experts": 2}, 320 + 2 * 384, 2 * (48 + 48 + 80)),
        (
            {"name": "mola", "num_experts": (2,), "router": TOP_2},
            2 * 704,
            2 * (6 * 48 + 80),
        ),
    ],
)
def test_every_method(fields, per_rank, fixed):
    size = lambda rank: round(3 * (per_rank * rank + fixed))
    for wanted, rank in (
        (size(7), 7),
        (size(7) + 3 * per_rank // 2, 7),
        (size(6) + 3 * per_rank // 2 + 1, 7),
        (1, 1),
    ):
        ranks = matched(x=method_like(rank=f"parameters:{wanted}", **fields))
        assert ranks.methods["x"].rank == rank
        lowest = ", the lowest" if wanted == 1 else ""
        note = f"rank {rank}{lowest}: {size(rank):,} parameters, nearest to the {wanted:,}"
        assert ranks.notes == {"x": note}


def test_a_chain_is_matched_from_its_end():
    ranks = matched(
        a=method_like("lora", "match:b"),
        b=method_like("mixlora", "match:c", num_experts=4, router=TOP_2),
        c=method_like("lora", 11),
    )
    # b has 3 (1,856 R + 192), nearest to 23,232 at R = 4; a is nearest to that, not to c.
    assert (ranks.methods["b"].rank, ranks.methods["a"].rank) == (4, 11)
    assert "nearest to the 22,848 of 'b'" in ranks.notes["a"]


def test_a_fixed_alpha_stays():
    ranks = matched(lora={**LORA, "rank": "match:mix", "alpha": 5.0}, mix=MIXLORA)
    assert ranks.methods["lora"].alpha == 5.0


def test_a_method_whose_size_does_not_depend_on_its_rank_is_refused():
    fields = method_like(
        "mixlora", "match:lora", num_experts=2, router=TOP_2, expert_lora={"rank": 3}
    )
    fields["target_modules"] = ("up_proj",)
    message = r"config\.adapters\.mix\.method\.rank: the number of parameters of the method "
    with pytest.raises(ConfigError, match=message + "'mixlora' does not depend on its rank"):
        matched(mix=fields, lora=LORA)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(AdapterMethod):
    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        low_rank = dataclasses.replace(self.low_rank, rank=self.rank**2)
        return Lora(low_rank, axes) if target in self.target_modules else None


def test_a_method_whose_size_is_not_linear_in_its_rank_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS._members, "square", Square)
    with pytest.raises(ConfigError, match="is not linear in its rank; give a number"):
        matched(x=method_like("square", "parameters:20000"))


def test_a_run_writes_what_was_asked_and_saves_what_was_trained(tmp_path):
    config = write_inputs(tmp_path)
    config.write_text(
        config.read_text().replace(
            "        adapters=dict(\n",
            '        adapters=dict(\n            lora=adapter("other", name="lora"),\n',
        )
    )
    rank = {"adapters__lora__method__rank": "match:default"}
    given = read_config(config, **rank, training__steps=3, training__eval_every=0)
    said, work = [], tmp_path / "run"
    with one_device():
        train(given, work, said.append)
    # Widths 32 and 48, 4 heads and 2 key-value heads of 8 channels: a layer of LoRA has 2 x 64 +
    # 2 x 48 + 3 x 80 = 464 for each rank, one of MixLoRA 4 x 224 + 4 x 4 x 240 + 4 x 32 = 4,864.
    note = "rank 10: 9,280 parameters, nearest to the 9,728 of 'default'"
    assert [line.strip() for line in said if "nearest" in line] == [note]
    written = json.loads((work / "config.json").read_text())
    assert written["adapters"]["lora"]["method"]["rank"] == "match:default"
    saved = load_adapter(work / "adapters" / "lora")
    assert saved.method.rank == 10

    (work / "adapters").rename(tmp_path / "elsewhere")  # as if the run had not finished
    stopped = load_adapter(resolve_adapter(work / "adapters" / "lora"))
    assert stopped.method == saved.method
    assert checksums(stopped.tree) == checksums(saved.tree)
