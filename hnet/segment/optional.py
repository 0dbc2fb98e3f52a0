"""Packages of the extra `segment`: regex, tokenizers, morfessor."""

from __future__ import annotations

import importlib
from types import ModuleType

from hnet.errors import UserError


def need(module: str) -> ModuleType:
    """
    Raises:
        UserError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this needs {module}: pip install 'hnet-kernels[segment]'") from None
