"""Many clients at once, some of them rude: no error of ours, nobody's text is another's, nothing stays behind."""

import asyncio
import gc
import json
import random

import pytest

from .running import Call, Limits, Running, events, httpx, offline, tiny

LIMITS = Limits(slots=16, queue=64, max_prompt_bytes=100, max_tokens=2000)
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def texts(model):
    return make_texts(model)


def make_texts(model):
    """{(prompt, max_tokens): text}"""
    r = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 é日"
    asked = [("".join(r.choices(letters, k=r.randrange(1, 30))), r.randrange(1, 24)) for _ in range(24)]
    found = {a: offline(model, *a) for a in asked}
    assert len({text[:5] for text in found.values() if len(text) >= 5}) > 12
    return found


async def client(http, r, texts, count, seen):
    """`count` requests one after the other, each of a kind drawn."""
    for _ in range(count):
        kind = r.choice(["whole", "stream", "whole", "stream", "leave", "leave early", "malformed", "long", "cold"])
        (prompt, n), text = r.choice(list(texts.items()))
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0}
        status = 200
        if kind == "whole":
            response = await http.post("/v1/completions", json=body)
            status = response.status_code
            assert response.json()["choices"][0]["text"] == text
        elif kind == "stream":
            async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                lines = [line async for line in response.aiter_lines()]
                status = response.status_code
            *pieces, done = events(lines)
            assert done == "[DONE]"
            assert "".join(e["choices"][0]["text"] for e in pieces) == text
        elif kind == "leave":
            async with http.stream(
                "POST", "/v1/completions", json={**body, "max_tokens": 2000, "stream": True}
            ) as response:
                status = response.status_code
                async for _ in response.aiter_lines():
                    break
        elif kind == "leave early":
            try:
                response = await http.post("/v1/completions", json={**body, "max_tokens": 2000}, timeout=0.02)
                status = response.status_code
            except httpx.TimeoutException:
                status = 0
        else:
            wrong = {"malformed": b'{"prompt": "a', "long": json.dumps({"prompt": "a" * 101}).encode(),
                     "cold": b'{"prompt": "a", "temperature": -1}'}[kind]  # fmt: skip
            response = await http.post("/v1/completions", content=wrong, headers=JSON)
            status = response.status_code
            assert response.json()["error"]["message"]
            assert status == 400
        seen.append((kind, status))


def load(server, texts, clients, count):
    """[(kind, status)] of all requests."""
    seen = []

    async def run():
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, verify=False) as http:
            await asyncio.gather(*(client(http, random.Random(i), texts, count, seen) for i in range(clients)))

    asyncio.run(run())
    server.until(server.idle)
    return seen


def check(seen, clients, count):
    assert len(seen) == clients * count
    assert {status for _, status in seen} <= {0, 200, 400}, seen
    assert all(status == 200 for kind, status in seen if kind in ("whole", "stream", "leave"))


def test_64_clients(model, texts):
    with Running(model, LIMITS) as server:
        seen = load(server, texts, 64, 2)
        check(seen, 64, 2)
        assert len({kind for kind, _ in seen}) == 7
        server.text(max_tokens=1)  # those who left make room
        assert len(server.engine.running) == 1
        gc.collect()
        assert sum(type(thing) is Call for thing in gc.get_objects()) <= 1


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def soak():
    """`python -m tests.serve.test_load`, a minute or more: memory over 2,048 requests, after 512 that fill caches."""
    served = tiny()
    asked = make_texts(served)
    with Running(served, LIMITS) as server:
        for clients, count in ((64, 8), (64, 16), (64, 16)):
            check(load(server, asked, clients, count), clients, count)
            gc.collect()
            print(f"{clients * count} requests, {resident() / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    soak()
