"""What pages of chunks have in common: a document that loads nothing, style and scripts inside, light or dark."""

from __future__ import annotations

import html
import json
from importlib.resources import files

BEGIN = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{css}</style>
</head>
<body class="{kind}">
<header>
<h1 dir="auto">{title}</h1>
"""  # noqa: E501


def begin(title: str, kind: str) -> str:
    """Up to and with the heading; `kind` is a class of the body."""
    return BEGIN.format(title=html.escape(title), css=_file("page.css"), kind=kind)


def end(script: str) -> str:
    """The file `script` after what all pages run, and the end of the document."""
    return f"<script>\n{_file('frame.js')}{_file(script)}</script>\n</body>\n</html>\n"


def for_script(value: object) -> str:
    """JSON for a script element: nothing in it can end one."""
    return json.dumps(value).replace("<", "\\u003c")


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")
