"""Files that are whole or not there, and a disk that is full, under whatever exception it comes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hnet.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives: it takes the place of `path` at the end, or is removed if anything goes wrong."""
    partial = path.with_name(f".partial_{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as e:
        partial.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.filename is None and not isinstance(e, UserError):  # that has its message
            e.filename = str(path)
        raise


def full_disk(error: BaseException | None) -> int:
    """ENOSPC or EDQUOT if that is what lies under `error`, else 0.

    Few writers raise it as an OSError: torch.save has it as the context of a RuntimeError, and has lost it where it
    opened the file itself or the error came from another process ("unexpected pos": the file is shorter than what was
    written); safetensors and copytree have it in the text; torch.distributed.checkpoint in a list of failures.
    """
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        e = waiting.pop()
        if e is None or any(e is s for s in seen):
            continue
        seen.append(e)
        if isinstance(e, OSError) and e.errno in FULL:
            return e.errno
        for code in re.findall(r"(?:\(os error |\[Errno )(\d+)", str(e)):
            if int(code) in FULL:
                return int(code)
        if isinstance(e, RuntimeError) and "unexpected pos" in str(e) and not isinstance(e.__context__, OSError):
            return errno.ENOSPC
        failures = getattr(e, "failures", None)
        if isinstance(failures, dict):
            waiting += [f[0] for f in failures.values()]
        waiting += [e.__cause__, e.__context__]
    return 0
