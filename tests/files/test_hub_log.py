"""Warnings of the hub's client library about repeated requests."""

import logging

import pytest
from huggingface_hub.utils import http_backoff

from moe_jax.files.hub_log import quiet_retries


def test_repeated_requests_are_hidden_within_the_context_only(monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    logger = logging.getLogger("huggingface_hub")  # does not propagate to the root logger
    logger.addHandler(caplog.handler)
    for name in ("huggingface_hub", "huggingface_hub.utils._http"):  # other tests may have set it
        caplog.set_level(logging.WARNING, logger=name)
    options = {"max_retries": 1, "base_wait_time": 0.001}

    def request():
        caplog.clear()
        with pytest.raises(Exception, match="refused"):
            http_backoff("HEAD", "http://127.0.0.1:9", **options)
        return [record.getMessage() for record in caplog.records]

    try:
        assert any("Retry 1/1" in message for message in request())
        with quiet_retries():
            assert request() == []
        assert request()
    finally:
        logger.removeHandler(caplog.handler)
