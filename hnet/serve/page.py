"""The page at /: a prompt, and its text as it comes, with the chunks in colours. It loads nothing from elsewhere."""

from __future__ import annotations

import html
from importlib.resources import files

CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{name}</title>
<style>
{css}</style>
</head>
<body>
<header><h1 dir="auto">{name}</h1><p id="state" role="status">ready</p></header>
<form id="form">
<label class="wide">Prompt <textarea id="prompt" rows="3" required></textarea></label>
<label>Bytes <input id="max_tokens" type="number" min="1" value="256"></label>
<label>Temperature <input id="temperature" type="number" min="0" step="any" value="0.8"></label>
<label>Top p <input id="top_p" type="number" min="0" max="1" step="any" value="0.95"></label>
<label>Seed <input id="seed" type="number" min="0" placeholder="any"></label>
<label{hidden}>Token <input id="token" type="password" autocomplete="off"></label>
<span><button id="write">Write</button> <button id="stop" type="button" disabled>Stop</button></span>
</form>
<main id="text" aria-label="The prompt and its text, chunk by chunk"></main>
<footer id="sizes"></footer>
<noscript>This page needs JavaScript.</noscript>
<script>
{js}</script>
</body>
</html>
"""


def page(name: str, token: bool) -> str:
    """token: ask for one."""
    here = files(__package__)
    css, js = (here.joinpath(file).read_text("utf-8") for file in ("page.css", "page.js"))
    return PAGE.format(name=html.escape(name), css=css, js=js, hidden="" if token else " hidden")
