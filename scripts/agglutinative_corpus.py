"""Prose of Turkish, Finnish, Hungarian or Estonian, from LibreOffice's help as Debian packages it:

    python scripts/agglutinative_corpus.py tr corpus/      # corpus/tr.txt, a paragraph a line, some megabytes
    python scripts/agglutinative_corpus.py fi corpus/ --morphemes  # also corpus/fi.morphemes.txt, by Voikko

Fetches libreoffice-help-LANGUAGE with `apt-get download` (run `apt-get update` once before), unpacks it aside and keeps
the text alone, less what was never translated: paragraphs that libreoffice-help-en-us has too. Its licence is
LibreOffice's (MPL 2.0 and others), so what comes out is yours to use, not part of this project. `--morphemes` takes
Voikko: apt-get install voikko-fi python3-libvoikko, and Debian's own python3.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

LANGUAGES = ("tr", "fi", "hu", "et")
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "dt", "dd", "pre", "div"}
LEFT_OUT = {"script", "style", "head", "nav", "footer", "header", "code", "pre"}
SHORTEST = 40  # characters: headings and names of menus are no prose


class Paragraphs(HTMLParser):
    """Collects the text of blocks in `found`, white space folded."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in LEFT_OUT:
            self.hidden += 1
        if tag in BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.flush()
        if tag in LEFT_OUT:
            self.hidden = max(self.hidden - 1, 0)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)

    def flush(self) -> None:
        if text := " ".join("".join(self.pieces).split()):
            self.found.append(text)
        self.pieces = []


def paragraphs(html: str) -> list[str]:
    parser = Paragraphs()
    parser.feed(html)
    parser.close()
    parser.flush()
    return parser.found


def prose(pages: list[str]) -> list[str]:
    """Paragraphs long enough, each once, in the order of the pages"""
    return list(dict.fromkeys(p for page in pages for p in paragraphs(page) if len(p) >= SHORTEST))


def help_pages(language: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        pages = sorted(fetch(f"libreoffice-help-{language}", Path(folder)).rglob("*.html"))
        return prose([p.read_text(encoding="utf-8", errors="replace") for p in pages])


def fetch(package: str, folder: Path) -> Path:
    """The package, unpacked into a folder below `folder`.

    Raises:
        SystemExit: apt-get or dpkg-deb failed; says with what.
    """
    for command in (["apt-get", "download", package], ["dpkg-deb", "-x", f"{package}.deb", "unpacked"]):
        if command[0] == "dpkg-deb":
            (found,) = folder.glob(f"{package}_*.deb")
            command[2] = found.name
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]} (try apt-get update)")
    return folder / "unpacked"


# --- Finnish morphemes ----------------------------------------------------------------------------------------------


def surface_morphemes(fst_output: str) -> tuple[str, ...]:
    """Of Voikko's FSTOUTPUT, "[Ln][Xp]talo[X]talo[Sine][Ny]ssa" -> talo, ssa: what stands outside of the tags, without
    the base form, which stands between [Xp] and [X]"""
    bare = re.sub(r"\[X[a-z]+\].*?\[X\]", "", fst_output)
    return tuple(p for p in re.split(r"(?:\[[^\]]*\])+", bare) if p)


def finnish_morphemes(lines: list[str]) -> dict[str, tuple[str, ...]]:
    """Of every word that all of Voikko's analyses cut alike and whose morphemes add up to it"""
    try:
        from libvoikko import Voikko
    except ImportError:
        sys.exit("--morphemes needs Voikko: apt-get install voikko-fi python3-libvoikko, and run this with python3")
    voikko, found = Voikko("fi"), {}
    for word in sorted({w.lower() for line in lines for w in re.findall(r"[^\W\d_]+", line)}):
        cuts = {surface_morphemes(a["FSTOUTPUT"]) for a in voikko.analyze(word) if "FSTOUTPUT" in a}
        if len(cuts) == 1 and "".join(cut := cuts.pop()) == word:
            found[word] = cut
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=LANGUAGES)
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("--morphemes", action="store_true", help="of Finnish words, by Voikko")
    a = parser.parse_args(argv)
    if a.morphemes and a.language != "fi":
        parser.error("--morphemes is for fi: Voikko analyses Finnish")
    english = set(help_pages("en-us"))
    lines = [line for line in help_pages(a.language) if line not in english]
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / f"{a.language}.txt"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{file}: {len(lines):,} paragraphs, {file.stat().st_size:,} bytes")
    if a.morphemes:
        known = finnish_morphemes(lines)
        file = a.out / f"{a.language}.morphemes.txt"
        file.write_text("".join(" ".join(parts) + "\n" for parts in known.values()), encoding="utf-8")
        print(f"{file}: {len(known):,} words")


if __name__ == "__main__":
    main()
