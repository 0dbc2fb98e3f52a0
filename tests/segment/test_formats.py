"""What `hnet segment` writes: bars, colours, JSON lines, a page, a picture; and hnet.segment.show."""

import base64
import html
import io
import json
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from hnet.cli import main
from hnet.errors import UserError
from hnet.segment import render_plain, render_rich, segment, segment_file, show
from hnet.segment.jsonl import json_line
from hnet.segment.page import write_page
from hnet.segment.picture import draw, joined

from .conftest import made_up

HOSTILE = "</script><script>alert(1)</script><!-- <b title='\"'>&amp; \x1b[31m \u202e\r\n".encode() + b"\xff\xe0\xb0"


# --- bars and colours -------------------------------------------------------------------------------------------------


def test_bars_are_one_sign_a_level():
    s = made_up("unhappy ness\n", {0: 1, 2: 0.9, 8: 0.8}, {0: 1, 8: 0.7})
    assert render_plain(s) == "un|happy ‖ness⏎\n"
    assert render_plain(s, 0) == "un|happy |ness⏎\n"
    assert render_plain(s, 1) == "unhappy |ness⏎\n"
    second = replace(made_up("x", {0: 1}, {0: 1}), offset=13)
    assert render_plain(second) == "‖x"  # not the first of its file


def test_what_steers_a_terminal_is_shown_not_obeyed():
    s = made_up("a\x1b[31m\x07\u202e\u009b\tb\n".encode() + b"\xe0\xb0", {0: 1})
    assert render_plain(s) == "a␛[31m␇\\u202e\\u009b⇥b⏎\n\\xe0\\xb0"


def test_neighbours_differ_in_colour_across_pieces():
    s = made_up("abcdef", {0: 1, 1: 1, 2: 1, 4: 1}, {0: 1, 2: 1})
    turns = [0, 0, 0]
    spans = [x.style for x in render_rich(s, None, turns).spans]
    assert len(spans) == len(set(spans)) == 4
    assert turns == [4, 2, 0]
    second = made_up("gh", {1: 1}, {})  # goes on with the chunk before
    again = [x.style for x in render_rich(second, None, turns).spans]
    assert again[0] == spans[-1] != again[1]


def test_every_colour_is_its_own_on_16_colour_terminals():
    s = made_up("abcd", {0: 1, 1: 1, 2: 1, 3: 1}, {0: 1, 2: 1})
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard").print(render_rich(s))
    assert len(set(re.findall(r"\x1b\[([\d;]+)m[a-d]", out.getvalue()))) == 4


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_json_lines_hold_the_file_and_every_boundary(two_stages):
    text = "శ్రీ\nగణేశాయ </script>\n".encode() * 6 + b"\xff\n"
    lines, whole = [], []
    for piece in segment_file(two_stages, io.BytesIO(text), seq_len=64):
        lines.append(json.loads(json_line(piece, [0, 1])))
        whole.append(piece)
    assert len(lines) > 2
    back = b"".join(base64.b64decode(x["base64"]) if "base64" in x else x["text"].encode() for x in lines)
    assert back == text
    assert [("base64" in x) for x in lines] == [b"\xff" in p.text for p in whole]
    assert [x["offset"] for x in lines] == [p.offset for p in whole]
    for i in (0, 1):
        starts = [o for x in lines for o in x["stages"][i]["starts"]]
        assert starts == [o + p.offset for p in whole for o in p.stages[i].starts]
        p = [x for line in lines for x in line["stages"][i]["probability"]]
        np.testing.assert_allclose(p, [x for q in whole for x in q.stages[i].probability], atol=1e-4)
    assert lines[0]["stages"][1]["offsets"] == lines[0]["stages"][0]["starts"]
    only = json.loads(json_line(whole[1], [1]))
    assert [s["stage"] for s in only["stages"]] == [1]
    assert only["bytes_per_chunk"] == round(len(whole[1].text) / len(whole[1].stages[1].starts), 4)


# --- the page, without a browser (test_page.py has one) ---------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def page_of(*pieces, **more):
    out = io.StringIO()
    write_page(out, pieces, **({"title": "t", "stages": len(pieces[0].stages)} | more))
    return out.getvalue()


def test_no_text_becomes_markup_and_nothing_is_fetched():
    page = page_of(made_up(HOSTILE, {0: 1, 5: 0.9}), title="</title><script>x", model="</script><i>m")
    found = Elements(page).found
    harmless = Elements(page_of(made_up("x", {0: 1}))).found
    assert [tag for tag, _ in found] == [tag for tag, _ in harmless]
    for tag, attributes in found:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
    assert "alert(1)" not in page
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_the_arrays_of_a_page_are_the_segmentation(two_stages):
    text = "naïve — తెలుగు\n".encode() * 12
    pieces = list(segment_file(two_stages, io.BytesIO(text), seq_len=64))
    scripts = re.findall(r'class="piece">(.*?)</script>', page_of(*pieces))
    (data,) = [json.loads(s) for s in scripts]

    def array(x, kind):
        return np.frombuffer(base64.b64decode(x), dtype=kind)

    assert base64.b64decode(data["text"]) == text
    np.testing.assert_allclose(array(data["loss"], "<u2") / 1000, np.concatenate([p.loss for p in pieces]), atol=6e-4)
    np.testing.assert_array_equal(array(data["depth"], "u1"), np.concatenate([p.depth for p in pieces]))
    for i, x in enumerate(data["prob"]):
        expected = np.concatenate([p.stages[i].probability for p in pieces])
        np.testing.assert_allclose(array(x, "<u2") / 65535, expected, atol=1e-5)


def test_a_page_is_written_as_pieces_come():
    """So many bytes of text are in memory at most, however long the file."""
    out, sizes = io.StringIO(), []

    def pieces():
        for _ in range(64):
            sizes.append(out.tell())
            yield made_up(b"x" * 4096, {0: 1})

    write_page(out, pieces(), title="t", stages=1)
    assert sizes[0] < sizes[20] < sizes[40] < sizes[63]


# --- picture ----------------------------------------------------------------------------------------------------------


def test_a_picture_has_a_row_a_line():
    s = made_up("శ్రీ <b> $x^2$\n\tab\n".encode() + b"\xff\n", {0: 1, 1: 0.9, 14: 0.9}, {0: 1})
    longer = made_up("a\n" * 20, {0: 1}, {0: 1})
    heights = []
    for part in (s, joined([s, replace(longer, offset=len(s.text))])):
        out = io.BytesIO()
        draw(part, out, stages=[0, 1], title="$t$ <x>")
        data = out.getvalue()
        assert data.startswith(b"\x89PNG")
        heights.append(struct.unpack(">I", data[20:24])[0])
    assert heights[1] > 3 * heights[0]


def test_a_picture_too_tall_is_named():
    with pytest.raises(UserError, match="401 rows, at most 400"):
        draw(made_up("\n" * 400 + "x", {0: 1}), io.BytesIO(), stages=[0], title="")


# --- notebook ---------------------------------------------------------------------------------------------------------


def test_show_frames_the_page(two_stages):
    shown = show(two_stages, "<b>naïve</b> text", title="a 'title\"")
    ((tag, attributes),) = Elements(shown._repr_html_()).found
    assert tag == "iframe"
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == shown.page
    assert html.escape("a 'title\"") in shown.page
    assert repr(shown) == render_plain(segment(two_stages, "<b>naïve</b> text".encode()))
    assert show(two_stages, b"\xff").segmentation.text == b"\xff"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(two_stages, tmp_path_factory):
    place = tmp_path_factory.mktemp("segment")
    two_stages.save_pretrained(place / "model")
    (place / "text").write_bytes(("a line of text\n" * 40).encode())
    return place


def run(*args, stdin=b""):
    return CliRunner().invoke(main, ["segment", *map(str, args)], input=stdin)


def test_the_format_is_that_of_the_file_written(saved, tmp_path):
    found = {}
    for name, more in (
        ("x.html", []),
        ("x.jsonl", ["--stage", 1]),
        ("x.png", []),
        ("x", []),
        ("y", ["--format", "ansi"]),
    ):
        r = run(saved / "model", saved / "text", "--out", tmp_path / name, "--bytes", 90, "--seq-len", 64, *more)
        assert (r.exit_code, r.output) == (0, ""), r.output
        found[name] = (tmp_path / name).read_bytes()
    assert found["x.html"].startswith(b"<!doctype html>")
    lines = [json.loads(line) for line in found["x.jsonl"].splitlines()]
    assert "".join(x["text"] for x in lines) == ("a line of text\n" * 6)
    assert [s["stage"] for x in lines for s in x["stages"]] == [1] * len(lines)
    assert found["x.png"].startswith(b"\x89PNG")
    assert "‖".encode() in found["x"]
    assert b"\x1b[" not in found["x"]
    assert b"\x1b[" in found["y"]


def test_all_of_a_file_is_shown_unless_told(saved):
    r = run(saved / "model", "-", "--stage", 0, stdin=(saved / "text").read_bytes())
    assert re.sub(r"[|⏎]", "", r.stdout) == "a line of text\n" * 40 + "\n"
    r = run(saved / "model", saved / "text", "--bytes", 20, "--format", "jsonl")
    assert json.loads(r.stdout)["text"] == "a line of text\na lin"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--format", "png"], "out must name a file for --format png"),
        (["--out", "/nowhere/x.html"], "cannot write /nowhere/x.html"),
        (["--stage", "2"], "stage must be 0 to 1 for this model, got 2"),
        (["--stage", "-1"], "stage must be 0 to 1 for this model, got -1"),
        (["--seq-len", "1"], "seq_len must be at least 2"),
    ],
)
def test_mistakes_are_one_line(saved, args, line):
    r = run(saved / "model", saved / "text", *args)
    assert r.exit_code == 1
    assert line in r.stderr
    assert r.stderr.count("\n") == 1
