"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Answered to the client.

    status: of HTTP.  param: the field that is wrong.  code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": _text(self.message), "type": kind, "param": _text(self.param), "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def _text(given: str | None) -> str | None:
    """Half of a surrogate pair, which JSON may have brought, is no text that can be sent back."""
    return given and given.encode("utf-8", "backslashreplace").decode()
