"""Texts over HTTP, in OpenAI's form of completions: `hnet serve`. docs/serving.md."""

from hnet.errors import UserError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as e:
    raise UserError(
        f"hnet serve needs FastAPI, uvicorn and prometheus-client: pip install 'hnet-kernels[serve]' ({e})"
    ) from None
