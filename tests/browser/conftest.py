"""A browser, the server, and pages of it that are watched."""

import json
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from playwright.sync_api import expect, sync_playwright
from serving.server_process import server_process

import moe_jax

KEY = "secret"


class Server(NamedTuple):
    url: str
    key: str

    @property
    def client(self):
        return openai.OpenAI(base_url=f"{self.url}v1", api_key=self.key)

    def models(self):
        return [model.to_dict() for model in self.client.models.list()]


class Visit:
    """A page with what it said to the console and whom it asked."""

    def __init__(self, page, server):
        self.page, self.server = page, server
        self.refusals = {401}  # the first request for the models has no key
        self.console, self.urls, self.bodies = [], [], []
        page.on("console", self._hear)
        page.on("pageerror", self._hear)
        page.on("dialog", self._dismiss)
        page.on("request", self._note)

    def _hear(self, message):
        self.console.append(message)

    def _dismiss(self, dialog):
        self.console.append(dialog.message)
        dialog.dismiss()

    def _note(self, request):
        self.urls.append(request.url)
        if request.method == "POST":
            self.bodies.append(request.post_data_json)

    def open(self):
        self.page.goto(self.server.url)
        self.enter_key(self.server.key)
        self.page.get_by_role("checkbox", name="stories").wait_for()

    def enter_key(self, key):
        self.page.get_by_label("API key of this server").fill(key)
        self.page.get_by_role("button", name="Use key").click()

    def leave_out(self, name):
        self.page.get_by_role("checkbox", name=name).uncheck()
        expect(self.card(name)).to_be_hidden()

    def ask(self, question, tokens=24):
        self.page.get_by_label("Tokens at most").fill(str(tokens))
        self.page.get_by_role("textbox", name="Question").fill(question)
        self.page.keyboard.press("Enter")

    def wait_for_answers(self):
        self.page.locator("#send:enabled").wait_for()

    def card(self, name):
        return self.page.get_by_role("region", name=name, exact=True)

    def check(self):
        """Fails after an error in the console or a request to another host."""
        said = [str(getattr(message, "text", message)) for message in self.console]
        expected = {f"the server responded with a status of {status}" for status in self.refusals}
        assert [text for text in said if not any(part in text for part in expected)] == []
        assert [url for url in self.urls if not url.startswith((self.server.url, "data:"))] == []


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium."""
    program = shutil.which("chromium")
    assert program, "no program `chromium` on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        # Its sandbox does not start for root, whom CI runs as; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The demo's base with an end token that it does not write, so that answers are long."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(Path(moe_jax.__file__).parent / "demo" / "base", folder)
    for name, end in (("config", {"eos_token_id": 0}), ("tokenizer_config", {"eos_token": "<s>"})):
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **end}))
    return folder


@pytest.fixture(scope="session")
def server(base, tmp_path_factory):
    """`moe-jax serve` with the base and two adapters that were not trained."""
    folder = tmp_path_factory.mktemp("adapters")
    router = moe_jax.TopKRouter(top_k=2)
    methods = {
        name: moe_jax.MixLoraConfig(
            rank=2, alpha=4.0, target_modules=("down_proj",), num_experts=experts, router=router
        )
        for name, experts in (("stories", 4), ("questions", 8))
    }
    model = moe_jax.AdaptedModel(moe_jax.load_base(base), methods)
    flags = []
    for name in methods:
        model.save(name, folder / name)
        flags += ["--adapter", f"{name}={folder / name}"]
    flags += ["--api-key", KEY, "--max-rows", "4", "--max-length", "256"]
    with server_process(base, *flags) as started:
        yield Server(f"http://127.0.0.1:{started.port}/", KEY)
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(60) == 0


@pytest.fixture
def visits(chromium, server):
    """Function that opens a page, with Playwright's options of a context; checks it at the end."""
    made = []

    def visit(**options):
        context = chromium.new_context(**options)
        context.set_default_timeout(20_000)
        made.append(Visit(context.new_page(), server))
        return made[-1]

    yield visit
    for each in made:
        each.check()
        each.page.context.close()


@pytest.fixture
def visit(visits):
    """The page with its models."""
    opened = visits()
    opened.open()
    return opened
