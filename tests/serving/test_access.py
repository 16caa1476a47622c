"""Hosts, origins and keys of requests: those that are refused, and those that are not."""

import json

from serving.raw_requests import call, send

from moe_jax.serving.app import AppSettings, build_app


def test_hosts_and_origins(served):
    get = lambda **headers: send(served, "GET", "/v1/models", **headers)[0]
    assert get(Host="evil.example") == get(Host="[::1") == get(Host="1.2.3.4.example") == 403
    assert get(Host="localhost:77") == get(Host="[::1]:77") == 200
    assert get(Origin="http://evil.example") == get(Origin="null") == 403
    assert get(Origin=served.url) == 200
    assert get(Host="localhost:5", Origin="http://localhost:6") == 403
    app = build_app(served.service, AppSettings(origins=("https://a.example",)))
    path = {"method": "GET", "path": "/v1/models"}
    assert call(app, **path, headers=[(b"origin", b"https://a.example")])[0] == 200
    assert call(app, **path, headers=[(b"origin", b"https://b.example")])[0] == 403
    assert call(app, **path, headers=[(b"host", b"a.example")])[0] == 200


def test_pages_of_an_allowed_origin_read_refusals(served):
    """A preflight with the headers that the `openai` package sends in a browser, then no key."""
    site = "https://a.example"
    app = build_app(served.service, AppSettings(api_key="secret", origins=(site,)))
    origin = (b"origin", site.encode())
    asked = [
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", b"authorization, content-type, x-stainless-lang"),
    ]
    sent = []
    assert call(app, "OPTIONS", headers=[origin, *asked], sent=sent)[0] == 200
    headers = dict(sent[0]["headers"])
    assert headers[b"access-control-allow-origin"] == site.encode()
    assert b"x-stainless-lang" in headers[b"access-control-allow-headers"]
    sent = []
    assert call(app, headers=[origin], sent=sent)[0] == 401
    assert dict(sent[0]["headers"])[b"access-control-allow-origin"] == site.encode()
    assert call(app, "OPTIONS", headers=[(b"origin", b"https://b.example"), *asked])[0] == 400


def test_keys(served):
    app = build_app(served.service, AppSettings(api_key="secret"))
    bearer = lambda key: [(b"authorization", f"Bearer {key}".encode())]
    assert call(app, headers=bearer("secret"))[0] == 200
    for headers in ([], bearer("secreT"), bearer(""), [(b"authorization", b"Basic secret")]):
        status, body = call(app, headers=headers)
        assert status == 401
        assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert call(app, "GET", "/metrics")[0] == 401
    assert call(app, "GET", "/health")[0] == 200
    assert call(app, "GET", "/")[0] == 200
