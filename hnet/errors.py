"""Mistakes of the user, and ends of a run that need no traceback. Every other exception is a bug of ours.

A command turns a `UserError` into one line and exit code 1; anything else keeps its traceback. Each is also the
built-in error that a caller of the library expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something given (a key, an option, a file) is not what it must be; the message names it and says what to do."""


class MissingPath(UserError, FileNotFoundError):
    """A file or folder that was named does not exist, or does not hold what it must."""


class PathTaken(UserError, FileExistsError):
    """Writing there would destroy something."""


class PathError(UserError, OSError):
    """The system refuses a file that was named: no permission, a folder, no space."""


class RunFailed(UserError, RuntimeError):
    """The run cannot go on; the message says why and what to change."""


@contextmanager
def user_path(path: str | Path, doing: str = "read") -> Iterator[None]:
    """Around the opening of a path that the user named: what the system says against it is a PathError, with its errno.

    Not for what happens to a file afterwards: an OSError there may be our own mistake.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as e:
        error = PathError(f"cannot {doing} {path}: {e.strerror or e}")
        error.errno = e.errno
        raise error from e
