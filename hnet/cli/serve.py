"""`hnet serve`: a model over HTTP."""

from __future__ import annotations

from pathlib import Path

import click

from hnet.device import pick_device
from hnet.errors import UserError

from .models import load_hnet
from .options import device_options


@click.command()
@click.argument("model", type=click.Path())
@click.option("--host", default="127.0.0.1", show_default=True, help="Another than this machine's own needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--name", help="What clients call the model; default: the last part of MODEL.")
@click.option(
    "--token", envvar="HNET_SERVE_TOKEN", show_envvar=True, help="Clients must send it: Authorization: Bearer TOKEN."
)
@click.option("--no-token", is_flag=True, help="Let anybody in who reaches --host.")
@click.option("--slots", default=16, show_default=True, help="Texts written at the same time.")
@click.option("--queue", default=64, show_default=True, help="Texts that wait for a slot; beyond: 429.")
@click.option("--max-prompt-bytes", default=8192, show_default=True)
@click.option("--max-tokens", default=4096, show_default=True, help="New bytes of a text; here a token is a byte.")
@click.option("--seconds", default=300.0, show_default=True, help="For a request, waiting included; then it is cut.")
@click.option("--grace", type=click.FloatRange(0), default=30.0, show_default=True,
              help="Seconds for running requests at SIGTERM; then they are cut.")  # fmt: skip
@device_options
def serve(
    model: str, host: str, port: int, name: str | None, token: str | None, no_token: bool, slots: int, queue: int,
    max_prompt_bytes: int, max_tokens: int, seconds: float, grace: float, device: str, dtype: str,
) -> None:  # fmt: skip
    """Write texts for clients of OpenAI's completions API, many at a time; a page for people at /.

    MODEL is an H-Net: a run directory, a checkpoint, a file, a repository. docs/serving.md has the rest.
    Needs FastAPI and uvicorn: pip install 'hnet-kernels[serve]'.
    """
    from hnet.generate import Engine
    from hnet.serve.app import make_app
    from hnet.serve.limits import Limits
    from hnet.serve.metrics import Metrics
    from hnet.serve.server import is_local, listen, url
    from hnet.serve.server import serve as run
    from hnet.serve.worker import Worker

    limits = Limits(slots, queue, max_prompt_bytes, max_tokens, seconds)
    if token == "":
        raise UserError("--token must not be empty")
    if token is not None and no_token:
        raise UserError("--token and --no-token do not go together")
    if token is None and not no_token and not is_local(host):
        raise UserError(f"{host} can be reached from other machines: give --token, or --no-token to let anybody in")
    listening = listen(host, port)
    lm = load_hnet(model, pick_device(device), dtype)
    engine = Engine(lm, slots=slots, max_length=1 + max_prompt_bytes + max_tokens, prefill_bytes=max_prompt_bytes + 1,
                    chunks=True)  # fmt: skip
    worker = Worker(engine, limits, Metrics())
    called = name or Path(model).absolute().name
    app = make_app(worker, name=called, token=token)
    run(app, worker, listening, grace=grace, ready=lambda: click.echo(f"serving {called} at {url(listening)}"))
