"""Which of several files train, are held out, or are a test set: told from their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from hnet.errors import UserError

ROLES = {"train": "train", "valid": "val", "val": "val", "dev": "val", "test": "test"}
# train-00001.parquet, valid.txt, dev2.jsonl ...; val and dev begin too many other words (value, device) to be followed
# by letters. Or after something: telugu_mtg_dev.te, wiki.train.tokens.
_FRONT = re.compile(r"()(train|valid|test|(?:val|dev)(?![a-z]))")
_INSIDE = re.compile(r"(.*?[._-])(train|valid|val|dev|test)(?:ing|ation)?(?=[._\-0-9]|$)")


def role(name: str) -> tuple[str, str] | None:
    """("train", "val" or "test", what comes before it in the name), or None."""
    found = _FRONT.match(name.lower()) or _INSIDE.match(name.lower())
    return (ROLES[found[2]], found[1]) if found else None


def by_role(files: list[Path], named: Iterable[Path] = ()) -> dict[str, list[Path]]:
    """The files of every role ("train", "val", "test"), in the order given.

    Names count when all files have such names, for training and for something else. Otherwise they count only where
    one folder has files of the same kind (the same name before the role) that train and that do not, and the files in
    `named`, which the user named one by one, count together: a lone test_x.py is text like any other. Files without a
    role train.

    Raises:
        ValueError: all names have a role, but none is for training.
    """
    one_by_one = set(named)
    roles = {p: role(p.name) for p in files}
    groups: dict[object, set[str]] = {}
    for p, r in roles.items():
        if r:
            groups.setdefault(_group(p, r, one_by_one), set()).add(r[0])
    present = set().union(*groups.values())
    everywhere = all(roles.values()) and len(present) > 1
    if everywhere and "train" not in present:
        raise UserError(
            f"no training file: {', '.join(p.name for p in files[:5])} are named as held-out or test files; "
            "add a train file, or name held-out files with val_data"
        )
    parts: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for p, r in roles.items():
        counts = r is not None and (everywhere or {"train"} < groups[_group(p, r, one_by_one)])
        parts[r[0] if r and counts else "train"].append(p)
    return parts


def _group(path: Path, role: tuple[str, str], one_by_one: set[Path]) -> object:
    return None if path in one_by_one else (path.parent, role[1])
