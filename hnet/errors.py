"""Mistakes of the user and ends of a run that need no traceback; every other exception is a bug of ours."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what to change."""
