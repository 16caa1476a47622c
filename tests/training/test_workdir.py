"""Which configurations go on with the run of a work directory."""

import copy
import json
from pathlib import Path

import pytest

from configs.tiny_mixlora import get_config
from moe_jax.adapters import METHODS
from moe_jax.config.run import parse_run_config, to_json
from moe_jax.errors import ConfigError
from moe_jax.training.workdir import require_same_run


@pytest.fixture(scope="module")
def config():
    return parse_run_config(get_config().to_dict(), METHODS)


def test_a_run_of_an_earlier_version_goes_on_with_what_was_the_only_way_then(config):
    settings = json.loads(to_json(config))
    former = copy.deepcopy(settings)
    del former["compute"]["block_tokens"]
    del former["adapters"]["default"]["data"]["packing"]
    require_same_run(former, config, settings, Path("work"))

    settings["adapters"]["default"]["data"]["packing"] = "first_fit"
    with pytest.raises(ConfigError, match="packing was 'none', is 'first_fit'"):
        require_same_run(former, config, settings, Path("work"))


def test_a_field_that_there_is_no_more_is_another_run(config):
    settings = json.loads(to_json(config))
    former = {**settings, "compute": {**settings["compute"], "gone": 1}}
    with pytest.raises(ConfigError, match=r"config\.compute\.gone was 1, is absent"):
        require_same_run(former, config, settings, Path("work"))
