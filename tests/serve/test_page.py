"""The server's page in Debian's Chromium, headless: it asks nobody but its server."""

import shutil

import pytest
import torch

from ..segment.test_page import FLAGS
from .running import Limits, Running, generate, tiny

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def server(model):
    with Running(model, Limits(slots=2, queue=2, max_prompt_bytes=200, max_tokens=100_000), token="sesame") as running:
        yield running


@pytest.fixture(scope="module")
def page(server):
    wrong = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((server.url, "data:")) else None)
        page.goto(server.url)
        yield page
        browser.close()
    assert wrong == []


def ended(page, text):
    page.wait_for_function(
        "text => document.getElementById('state').textContent.includes(text)", arg=text, timeout=10_000
    )


def write(page, prompt, count, token="sesame"):
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", str(count))
    page.fill("#temperature", "0")
    page.fill("#token", token)
    page.click("#write")


def test_a_text_streams_in_the_colours_of_its_chunks(model, page):
    prompt = "été <b>&\n日 "
    write(page, prompt, 40)
    ended(page, "ended: length")
    data = prompt.encode() + generate(model, prompt, temperature=0, max_new_bytes=40)[0]
    assert page.evaluate("document.getElementById('text').textContent") == data.decode(errors="replace")
    mask = model(torch.tensor([[254, *data]])).routing[0].boundary_mask[1:-1].tolist()
    starts = {len(data[: at + 1].decode(errors="replace")) - 1 for at, begins in enumerate(mask) if begins}
    spans = page.eval_on_selector_all(
        "#text span", "all => all.map(s => [Array.from(s.textContent).length, s.className])"
    )
    at, found = 0, set()
    for length, _ in spans:
        found.add(at)
        at += length
    assert found == starts | {0}
    assert f"stage 0: {sum(mask)} chunks" in page.inner_text("#sizes")
    colours = page.eval_on_selector_all("#text span", "all => all.map(s => getComputedStyle(s).backgroundColor)")
    assert len(set(colours[1:])) == 2


def test_stop_frees_the_slot(server, page):
    write(page, "a", 100_000)
    page.wait_for_function("() => document.getElementById('text').textContent.length > 5", timeout=10_000)
    page.click("#stop")
    ended(page, "stopped")
    server.until(server.idle)
    assert page.is_enabled("#write")


def test_a_wrong_token_is_said(page):
    write(page, "a", 4, token="open")
    ended(page, "the bearer token is missing or wrong")
    assert page.get_attribute("#state", "class") == "error"
