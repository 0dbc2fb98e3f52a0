"""A server of a tiny untrained model, in a thread of the test, on a port of its own.

Tests take from here what needs FastAPI, so that they skip where it is missing.
"""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from hnet import HNetConfig  # noqa: E402
from hnet.generate import Engine, SamplingConfig, generate  # noqa: E402
from hnet.serve.app import make_app  # noqa: E402
from hnet.serve.limits import Limits  # noqa: E402
from hnet.serve.metrics import Metrics  # noqa: E402
from hnet.serve.server import Server, listen, url  # noqa: E402
from hnet.serve.worker import Call, Worker  # noqa: E402

from ..model.test_decode_graphs import decided  # noqa: E402

__all__ = ["Call", "Engine", "Limits", "Running", "SamplingConfig", "events", "generate", "httpx", "offline", "tiny"]
LIMITS = Limits(slots=4, queue=20, max_prompt_bytes=200, max_tokens=300)


def tiny():
    model = decided(HNetConfig.preset("tiny"))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # peaked, so that rounding decides nothing and a text depends on what was before
        for unwanted in (slice(0, 32), slice(127, 256)):  # nearly always text of ASCII
            model.lm_head.weight[unwanted] = 0
    return model


def offline(model, prompt, max_tokens, **options):
    """Greedy, alone, shown as the server shows bytes."""
    (text,) = generate(model, prompt, temperature=0, max_new_bytes=max_tokens, **options)
    return text.decode(errors="replace")


class Running:
    def __init__(self, model, limits=LIMITS, token=None, grace=5.0):
        self.engine = Engine(model, slots=limits.slots, max_length=1 + limits.max_prompt_bytes + limits.max_tokens,
                             prefill_bytes=256, chunks=True)  # fmt: skip
        self.worker = Worker(self.engine, limits, Metrics())
        self.listening = listen("127.0.0.1", 0)
        self.url, ready = url(self.listening), threading.Event()
        app = make_app(self.worker, name="tiny", token=token)
        self.server = Server(app, self.worker, grace, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]})
        self.thread.start()
        assert ready.wait(20)
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert not self.worker.thread.is_alive()

    def ask(self, prompt="abc", headers=None, **options):
        return self.client.post(
            "/v1/completions", json={"prompt": prompt, "temperature": 0, **options}, headers=headers
        )

    def text(self, *args, **options):
        response = self.ask(*args, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def events(self, prompt="abc", **options):
        body = {"prompt": prompt, "temperature": 0, "stream": True, **options}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            yield from events(response.iter_lines())

    def until(self, condition, seconds=10.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.005)

    def idle(self):
        return not self.worker.texts and not self.engine.busy


def events(lines):
    """What the data of server-sent events holds; "[DONE]" as it is."""
    for line in lines:
        if line:
            assert line.startswith("data: ")
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])
