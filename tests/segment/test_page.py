"""The page of chunks in Debian's Chromium, headless, without a network."""

import json
import re
import shutil
import time

import numpy as np
import pytest

from hnet.segment import Segmentation, Stage, show
from hnet.segment.page import write_page
from hnet.segment.timeline import timeline

from .conftest import made_up

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens the page of pieces; at the end nothing was asked of a network and no script had failed."""
    wrong = []
    contexts = []

    def open_page(*pieces, scheme="light", text=None, **more):
        context = browser.new_context(viewport={"width": 900, "height": 600}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "about:")) else None)
        with (tmp_path / "page.html").open("w") as out:
            if text is None:
                write_page(out, pieces, **({"title": "t", "stages": len(pieces[0].stages)} | more))
            else:
                out.write(text)
        page.goto((tmp_path / "page.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def texts(page, selector=".c"):
    return page.eval_on_selector_all(selector, "all => all.map(c => c.textContent)")


def drawn(page):
    """Waits for what the next frame draws."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_chunks_lie_in_their_groups_and_hide_under_a_probability(opened):
    s = made_up("un happy\nness more", {0: 1, 2: 0.9, 8: 0.6, 13: 0.95}, {0: 1, 8: 0.8, 13: 0.55})
    page = opened(s, title="three words")
    assert page.title() == page.inner_text("h1") == "three words"
    assert texts(page) == ["un", " happy", "\nness", " more"]
    assert texts(page, ".g") == ["un happy", "\nness", " more"]
    assert texts(page, ".g:first-child > .c") == ["un", " happy"]
    assert "4 chunks of 4.5 bytes" in page.inner_text("#summary")

    def slide(p):
        page.eval_on_selector("#threshold", f"e => {{ e.value = {p}; e.dispatchEvent(new Event('input')); }}")
        assert page.inner_text("#threshold-value") == f"{p:.2f}"
        drawn(page)

    slide(0.7)  # stage 0's at 8 goes, and with it stage 1's there; of those at 13 only stage 1's
    assert texts(page) == ["un", " happy\nness", " more"]
    assert texts(page, ".g") == ["un happy\nness more"]
    assert "stage 1: 1 chunks" in page.inner_text("#summary")
    slide(0.99)
    assert texts(page) == ["un happy\nness more"]
    slide(0.5)
    page.uncheck("#stages input[value='0']")
    drawn(page)
    assert texts(page, ".g") == []
    assert texts(page) == ["un happy", "\nness", " more"]
    page.click("#stages input[value='1']")  # the last box stays
    assert page.is_checked("#stages input[value='1']")


def test_pointer_and_keys_show_bytes_probability_and_loss(opened):
    s = made_up("aé b\ncd e", {0: 1, 3: 0.75, 5: 0.96875, 8: 0.625}, loss=np.arange(9) / 8)
    page = opened(s)

    def seen():
        return page.inner_text("#about")

    def row(n):
        return page.eval_on_selector_all(f"#bytes tr:nth-child({n}) td", "all => all.map(x => x.textContent)")

    page.hover(".c[data-i='3']")
    assert " b — bytes 3 to 4: 2 bytes, 0.88 nats. Begins: stage 0 with p 0.750." in seen()
    page.click(".c[data-i='0']")
    assert row(1) == ["a", "é"]
    assert row(2) == ["61", "C3", "A9"]
    assert row(3) == ["1.00", "0.13", "0.13"]
    assert row(4) == ["0.00", "0.13", "0.25"]

    def focused():
        return page.evaluate("Number(document.activeElement.dataset.i)")

    def press(key):
        page.keyboard.press(key)
        assert page.eval_on_selector_all(".c[tabindex='0']", "all => all.length") == 1
        assert page.eval_on_selector("[aria-selected]", "e => e === document.activeElement && e.role")
        return focused()

    assert [press(k) for k in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight")] == [3, 5, 8, 8]
    assert [press(k) for k in ("ArrowLeft", "ArrowUp", "ArrowDown", "End", "Home")] == [5, 3, 8, 8, 5]
    assert [press(k) for k in ("Control+Home", "Control+End")] == [0, 8]
    assert "stage 0 with p 0.625" in seen()
    page.focus("#theme")
    page.keyboard.press("Tab")  # the text is one stop, at the chunk last visited
    assert focused() == 8
    assert page.get_attribute("#text", "role") == "listbox"
    assert page.get_attribute(".c", "role") == "option"


def test_a_shared_character_is_bytes_and_a_cut_mark_has_a_circle(opened):
    text = "కీ క్ష é".encode() + b"\xff\n" + "مرحبا\n\x1b\u202e".encode()
    assert text.index("క్ష".encode()) == 7
    s = made_up(text, {0: 1, 2: 0.9, 3: 0.9, 7: 1, 13: 0.9, 16: 1})
    page = opened(s)
    assert texts(page)[:5] == ["E0·B0", "95", "\u0c40 ", "క్", "ష"]
    assert texts(page, "#text .x") == ["E0·B0", "95", "FF", "^[", "U+202E"]
    assert page.get_attribute(".c[data-i='3']", "class").split()[-1] == "mark"
    assert page.get_attribute(".c[data-i='13']", "class").split()[-1] == "join"

    def before(i):
        return page.evaluate(f"getComputedStyle(document.querySelector('.c[data-i=\"{i}\"]'), '::before').content")

    assert before(3) == '"◌"'
    assert before(13) == '"\u200c"'
    assert before(7) == before(16) == "none"
    arabic, latin = page.evaluate(
        """() => { const r = document.createRange(), find = (s) => {
             const w = document.createTreeWalker(document.querySelector('#text'), NodeFilter.SHOW_TEXT);
             while (w.nextNode()) { const at = w.currentNode.data.indexOf(s); if (at >= 0) {
               r.setStart(w.currentNode, at); r.setEnd(w.currentNode, at + 1);
               return r.getBoundingClientRect().right; } } };
             return [find('م'), find('é')]; }"""
    )
    assert arabic > 850 > 200 > latin  # from right to left, at the right


def test_text_is_never_markup(opened):
    text = "</script><script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">&amp;\n"
    page = opened(made_up(text, {0: 1, 9: 0.9}), title="<b>&amp;")
    assert page.inner_text("h1") == page.title() == "<b>&amp;"
    assert "".join(texts(page)) == text
    assert page.eval_on_selector_all("#text img, #text script, h1 b", "all => all.length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_by_preference_and_by_button(opened, scheme):
    page = opened(made_up("a b", {0: 1, 1: 1}), scheme=scheme)

    def colours():
        return page.evaluate(
            """() => [document.body, document.querySelector('.c')].flatMap(e => {
                 const s = getComputedStyle(e); return [s.color, s.backgroundColor]; })"""
        )

    first = colours()
    page.click("#theme")
    second = colours()
    page.click("#theme")
    assert colours() == first
    for ink, paper in zip(first[::2], first[1::2], strict=True):
        assert contrast(ink, paper) > 7
    for ink, paper in zip(second[::2], second[1::2], strict=True):
        assert contrast(ink, paper) > 7
    assert (luminance(first[1]) > luminance(second[1])) == (scheme == "light")


def luminance(colour):
    """Of rgb(...) or color(srgb ...), by WCAG."""
    x = [float(v) for v in re.findall(r"[\d.]+", colour)][:3]
    x = [v / 255 for v in x] if colour.startswith("rgb") else x
    return sum(
        w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
        for w, v in zip((0.2126, 0.7152, 0.0722), x, strict=True)
    )


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_megabyte_opens_and_scrolls_at_once(opened):
    rng = np.random.default_rng(0)
    words = np.array(["chunk", "of", "తెలుగు", "text", "byte", "é", "model", "boundary"])
    line = [" ".join(w) for w in rng.choice(words, (20000, 9))]
    text = "\n".join(line).encode()[: 1 << 20]
    while text[-1] & 0x80:
        text = text[:-1]
    starts = np.flatnonzero(np.frombuffer(text, np.uint8) == 32)
    starts = np.concatenate([[0], starts])
    p = rng.random(len(text)).astype(np.float32)
    groups = starts[::3]
    stages = (Stage(np.arange(len(text)), p, starts), Stage(starts, p[starts], groups))
    begin = time.perf_counter()
    page = opened(Segmentation(text, p, stages), title="1 MB")
    page.wait_for_selector(".c")
    opening = time.perf_counter() - begin
    assert page.eval_on_selector_all(".c", "all => all.length") < 12000  # of 200,000: only what is near
    slowest = page.evaluate(
        """async () => { let worst = 0, height = document.documentElement.scrollHeight;
             for (let k = 1; k <= 20; k++) { const t = performance.now(); scrollTo(0, height * k / 20);
               await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
               worst = Math.max(worst, performance.now() - t); } return worst; }"""
    )
    page.keyboard.press("Tab")
    page.focus(".c[tabindex='0']")
    page.keyboard.press("Control+End")
    assert page.evaluate("Number(document.activeElement.dataset.i)") == starts[-1]
    assert page.eval_on_selector(".c:focus", "e => e.getBoundingClientRect().bottom < innerHeight")
    assert texts(page, ".c:focus") == [text[starts[-1] :].decode()]
    print(f"1 MB: open {opening:.1f} s, slowest of 20 jumps {slowest:.0f} ms")
    assert slowest < 2000  # on a machine that does much else; 0.2 s on one core
    assert page.eval_on_selector_all(".c", "all => all.length") < 12000


def test_a_notebook_s_frame_runs(opened, two_stages):
    page = opened(text=show(two_stages, "<b>framed</b>")._repr_html_())
    frame = page.frames[1]
    frame.wait_for_selector(".c")
    assert "".join(texts(frame)) == "<b>framed</b>"


def test_a_timeline_moves_from_evaluation_to_evaluation(opened, tmp_path):
    lines = [{"step": 10 * i, "lines": [{"text": "un <b>é", "starts": starts}]} for i, starts in enumerate(MOVING)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    rows = [{"step": 10 * i, "val_bpb": 8.0 - i} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    page = opened(text=timeline(tmp_path))

    def shown():
        return texts(page, "summary .c"), texts(page, "summary .new"), page.inner_text("#summary")

    assert shown() == (["u", "n <b>é"], ["n <b>é"], "step 20 · 6.000 held-out bits a byte · 2 in these lines")
    page.focus("#evaluation")
    page.keyboard.press("ArrowLeft")
    assert shown() == (["un", " <b>é"], [], "step 10 · 7.000 held-out bits a byte · 1 in these lines")
    page.select_option("#stage", "1")
    assert shown()[0] == ["un <b>C3", "A9"]
    page.focus("summary")
    page.keyboard.press("Enter")
    page.wait_for_selector(".history .row")
    assert texts(page, ".history .step") == ["step 0", "step 10", "step 20"]
    page.locator("#chart circle").first.click()
    assert page.inner_text("#summary").startswith("step 0 · 8.000")
    assert page.get_attribute("#evaluation", "aria-valuetext") == "step 0"


MOVING = [[[0, 2, 5], [0]], [[0, 2], [0, 7]], [[0, 1], [0]]]  # of each evaluation, by stage
