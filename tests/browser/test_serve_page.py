"""The page of `moe-jax serve` in Chromium, against the server itself."""

import json
import re

import pytest
from playwright.sync_api import expect

QUESTION = "Sort the letters d k e x."


def served(server, model, tokens=24):
    """Choice of the same question without the page."""
    answer = server.client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=tokens,
        extra_body={"moe_jax": {"routing": True}},
    )
    return answer.choices[0].to_dict()


def weights_in(tip):
    """Weights by expert in the box of a token."""
    return {int(e): float(w) for e, w in re.findall(r"expert (\d+)\s*(\d\.\d\d)", tip.inner_text())}


def rounded(token, layer, experts):
    chosen = dict(zip(token["experts"][layer], token["weights"][layer], strict=True))
    return {expert: pytest.approx(chosen.get(expert, 0.0), abs=0.006) for expert in range(experts)}


def test_answers_stream_side_by_side_with_their_experts(visit, server):
    page = visit.page
    adapters = ("stories", "questions")
    # Numbers of tokens in the cards after each change.
    page.evaluate("""() => {
      window.steps = [];
      new MutationObserver(() => window.steps.push(Object.fromEntries(
        [...document.querySelectorAll(".card")].map((card) =>
          [card.getAttribute("aria-label"), card.querySelectorAll(".t").length])
      ))).observe(document.getElementById("cards"), { childList: true, subtree: true });
    }""")
    tokens = 120  # long enough that the answers overlap, however late the browser asks for some
    visit.ask(QUESTION, tokens)
    visit.wait_for_answers()
    # Each answer has begun before another one is complete.
    names = [model["id"] for model in visit.server.models()]
    final = {name: visit.card(name).locator(".t").count() for name in names}
    steps = page.evaluate("window.steps")
    assert any(all(0 < step[name] < final[name] for name in adapters) for step in steps)
    for name in names:
        choice = served(server, name, tokens)
        assert final[name] == len(choice["moe_jax"]["tokens"]) > 1
        colors = (
            visit.card(name).locator(".t").evaluate_all("all => all.map((t) => t.style.background)")
        )
        assert all(colors) if name in adapters else not any(colors)
        assert visit.bodies[names.index(name)]["model"] == name


def test_weights_at_pointer_and_focus_layer_by_layer(visit, server):
    page, card, tip = visit.page, visit.card("stories"), visit.page.locator("#tip")
    visit.ask(QUESTION)
    visit.wait_for_answers()
    tokens = served(server, "stories")["moe_jax"]["tokens"]
    experts = visit.server.models()[1]["moe_jax"]["num_experts"]
    card.locator(".t").nth(3).hover()
    assert weights_in(tip) == rounded(tokens[3], 0, experts)
    page.get_by_role("heading", name="Ask the base").hover()
    expect(tip).to_be_hidden()

    card.get_by_role("button").last.focus()
    page.keyboard.press("Tab")  # the conversation, which scrolls
    if not card.locator(".t:focus").count():
        page.keyboard.press("Tab")
    assert weights_in(tip) == rounded(tokens[0], 0, experts)
    first = card.locator(".t").evaluate_all("all => all.map((t) => t.style.background)")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert weights_in(tip) == rounded(tokens[1], 1, experts)
    assert card.locator(".t").evaluate_all("all => all.map((t) => t.style.background)") != first
    expect(page.locator("#shown")).to_contain_text("1 of 0 to")
    outline = card.locator(".t:focus").evaluate("(t) => getComputedStyle(t).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()

    chosen = card.get_by_role("button", name="expert 0", exact=False)
    chosen.click()
    assert chosen.get_attribute("aria-pressed") == "true"
    dim = card.locator(".t").evaluate_all("all => all.map((t) => t.classList.contains('dim'))")
    assert dim == [0 not in token["experts"][1] for token in tokens]


def test_stop_keeps_what_was_answered(visit):
    visit.leave_out("base")
    visit.page.evaluate("""() => new MutationObserver((_, observer) => {
      if (!document.querySelector(".t")) return;
      observer.disconnect();
      document.getElementById("stop").click();
    }).observe(document.getElementById("cards"), { childList: true, subtree: true })""")
    visit.ask(QUESTION, tokens=120)
    visit.wait_for_answers()
    notes = visit.page.locator(".turn > .hint").all_inner_texts()
    assert len(notes) == 2 and all(note.endswith(", stopped") for note in notes)
    assert 0 < visit.page.locator(".t").count() < 240
    expect(visit.page.get_by_role("button", name="Stop")).to_be_disabled()


def test_conversation_goes_on_until_it_is_reset(visit):
    page = visit.page
    visit.leave_out("questions")
    for question in ("One?", "Two?"):
        visit.ask(question, tokens=4)
        visit.wait_for_answers()
    stories = [body["messages"] for body in visit.bodies if body["model"] == "stories"]
    assert [message["role"] for message in stories[1]] == ["user", "assistant", "user"]
    assert stories[1][0] == stories[0][0] and stories[1][2]["content"] == "Two?"
    answer = visit.card("stories").locator(".text").first.inner_text()
    assert stories[1][1]["content"].split() == re.sub("[\u21b5\u2026]", "", answer).split()

    page.get_by_role("button", name="reset the conversation with stories").click()
    assert visit.card("stories").locator(".turn").count() == 0
    visit.ask("Three?", tokens=4)
    visit.wait_for_answers()
    last = {body["model"]: len(body["messages"]) for body in visit.bodies[-2:]}
    assert last == {visit.server.models()[0]["id"]: 5, "stories": 1}
    page.get_by_role("button", name="Reset all").click()
    assert page.locator(".turn").count() == 0

    page.get_by_label("Use as").select_option("text to continue")
    for question in ("Once", " and"):
        visit.ask(question, tokens=4)
        visit.wait_for_answers()
    first, second = [body["prompt"] for body in visit.bodies if "prompt" in body][1::2]
    assert first == "Once" and second.startswith("Once") and second.endswith(" and")
    assert len(second) > len("Once and")


def test_key_is_asked_for_and_forgotten(visits):
    visit = visits()
    page = visit.page
    page.goto(visit.server.url)
    visit.enter_key("wrong")
    expect(page.locator("#key-error")).to_contain_text(re.compile("key", re.IGNORECASE))
    assert page.get_by_role("checkbox").count() == 0
    visit.enter_key(visit.server.key)
    page.get_by_role("checkbox", name="stories").wait_for()
    expect(page.locator("#key-form")).to_be_hidden()
    visit.ask(QUESTION, tokens=4)
    visit.wait_for_answers()
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]
    page.reload()
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.get_by_label("API key of this server")).to_have_value("")
    assert page.locator(".t").count() == 0


def test_errors_are_shown_where_they_are_mended(visit):
    page = visit.page
    visit.refusals.add(400)
    page.get_by_label("Seed").fill(str(10**30))
    visit.ask(QUESTION)
    expect(page.locator("#seed-error")).not_to_be_empty()
    assert page.get_by_label("Seed").get_attribute("aria-invalid") == "true"
    expect(page.get_by_role("textbox", name="Question")).to_have_value(QUESTION)
    assert page.locator(".turn").count() == 0

    page.get_by_label("Seed").fill("")
    visit.ask("letters " * 3000)
    visit.wait_for_answers()
    errors = visit.card("stories").locator(".error")
    expect(errors).to_have_count(1)
    expect(page.locator("#seed-error")).to_be_empty()
    visit.ask(QUESTION, tokens=4)
    visit.wait_for_answers()
    assert len(visit.bodies[-1]["messages"]) == 1  # a refused question is not part of what follows


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "<style>*{display:none}</style>",
    "\u202e\u0000&lt;",
)


def test_texts_are_not_markup(visits, server):
    visit = visits()
    page = visit.page
    names = ["base<b>", HOSTILE[0], "javascript:alert(1)"]
    described = {"kind": "adapter", "method": HOSTILE[1], "num_experts": 2, "top_k": 1}
    models = [
        {"id": name, "moe_jax": {**described, "num_layers": 1, "chat": True}} for name in names
    ]
    tokens = [
        {"id": at, "text": text, "experts": [[1]], "weights": [[1.0]]}
        for at, text in enumerate(HOSTILE)
    ]
    choice = {"delta": {"content": "".join(HOSTILE)}, "moe_jax": {"tokens": tokens}}
    chunks = [{"choices": [choice]}, {"error": {"message": HOSTILE[0], "param": None}}]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": models}))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=events, content_type="text/event-stream"),
    )
    page.goto(server.url)
    page.get_by_role("checkbox").first.wait_for()
    tags = "[...document.querySelectorAll('*')].map((e) => e.tagName)"
    before = set(page.evaluate(tags))
    visit.ask(HOSTILE[1])
    visit.wait_for_answers()
    page.locator(".t").first.hover()
    added = {"H2", "SMALL", "SECTION", "CODE", "TABLE", "TR", "TD", "I", "DIV"}
    assert set(page.evaluate(tags)) - before <= added
    assert page.locator("main img, main script, main style, main b").count() == 0
    shown = page.locator("section").nth(1).inner_text()
    assert all(text in shown for text in HOSTILE[:3]) and "<202e><0>&lt;" in shown
    assert shown.count(HOSTILE[0]) == 3  # name, token and error


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]
)
def test_both_themes_wide_and_on_a_phone(visits, tmp_path, scheme, width):
    """The pictures are for looking at: pytest --basetemp."""
    visit = visits(
        color_scheme=scheme, viewport={"width": width, "height": 850}, has_touch=width < 500
    )
    visit.open()
    page = visit.page
    visit.ask(QUESTION)
    visit.wait_for_answers()
    token = visit.card("stories").locator(".t").nth(3)
    token.tap() if width < 500 else token.hover()
    expect(page.locator("#tip")).to_be_visible()
    page.screenshot(path=tmp_path / "page.png")
    page.screenshot(path=tmp_path / "whole_page.png", full_page=True)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 29)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Where there is room, answers are beside one another, and on a phone below one another.
    boxes = [visit.card(name).bounding_box() for name in ("stories", "questions")]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 500)
    sizes = page.locator("button:visible").evaluate_all("all => all.map((b) => b.offsetHeight)")
    assert min(sizes) >= 20
