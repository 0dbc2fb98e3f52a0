"""Completions as OpenAI's clients ask for them, over real connections."""

import json
import signal
import threading

import pytest
import torch

from .running import LIMITS, Engine, Limits, Running, SamplingConfig, generate, httpx, offline, tiny


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def server(model):
    with Running(model) as running:
        yield running
        running.until(running.idle)


def test_a_text_is_that_of_generate(server, model):
    response = server.ask("Once upon", max_tokens=40)
    assert response.status_code == 200
    answer = response.json()
    text = offline(model, "Once upon", 40)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 40, "total_tokens": 49}
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")


def test_a_stream_holds_whole_characters_and_the_same_text(server, model):
    for prompt in ("Once upon", "é", "日本"):
        *found, done = server.events(prompt, max_tokens=50, stream_options={"include_usage": True})
        assert done == "[DONE]"
        assert found[-1]["choices"] == []
        assert found[-1]["usage"]["completion_tokens"] == 50
        choices = [e["choices"][0] for e in found[:-1]]
        assert len(choices) > 10
        assert "".join(c["text"] for c in choices) == offline(model, prompt, 50)
        assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] == "length"


def test_a_stream_of_real_characters_is_not_broken(server):
    """The bias leaves nothing but the bytes of characters of three bytes."""
    bias = {str(b): 1000 for b in [*range(0xE4, 0xE9), *range(0x80, 0xC0)]}
    options = dict(max_tokens=60, temperature=1, seed=3, valid_utf8=True, logit_bias=bias)
    pieces = [e["choices"][0]["text"] for e in server.events("x", **options) if e != "[DONE]"]
    text = "".join(pieces)
    assert "�" not in text
    assert len(text) == 20
    assert all(len(c.encode()) == 3 for c in text)
    assert {len(p) for p in pieces} <= {0, 1}
    assert text == server.text("x", **options)


def test_prompts_n_echo_and_seeds(server, model):
    answer = server.ask(["ab", [99, 100]], n=2, echo=True, temperature=1, seed=5, max_tokens=9).json()
    expected = []
    for i, prompt in enumerate([b"ab", b"ab", b"cd", b"cd"]):
        engine = Engine(model, slots=1, max_length=64)
        request = engine.submit(prompt, SamplingConfig(), max_new_bytes=9, seed=5 + i)
        while engine.busy:
            engine.step()
        expected.append((prompt + request.text).decode(errors="replace"))
    assert [c["text"] for c in answer["choices"]] == expected
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    streamed = [""] * 4
    for event in server.events(["ab", [99, 100]], n=2, echo=True, temperature=1, seed=5, max_tokens=9):
        if event != "[DONE]":
            streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == expected


def test_stop_and_nothing_to_write(server, model):
    whole = offline(model, "abc", 40)
    stop = whole[10:12]
    answer = server.ask(max_tokens=40, stop=[stop, "never there"]).json()["choices"][0]
    assert answer["text"] == whole[: whole.index(stop)]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", "stop")
    assert server.text(max_tokens=0) == ""
    assert server.text(max_tokens=0, echo=True) == "abc"
    assert list(server.events(max_tokens=0))[-1] == "[DONE]"


def test_logprobs(server, model):
    found = server.ask("abc", max_tokens=6, logprobs=2).json()["choices"][0]
    (logits,) = model(torch.tensor([[254, *b"abc"]])).logits[:, -1].float()
    best = logits.log_softmax(-1).max()
    logprobs = found["logprobs"]
    assert logprobs["token_logprobs"][0] == pytest.approx(best.item(), abs=1e-3)
    assert logprobs["token_logprobs"] == [max(top.values()) for top in logprobs["top_logprobs"]]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 6
    streamed = [e["choices"][0]["logprobs"] for e in server.events("abc", max_tokens=6, logprobs=2) if e != "[DONE]"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in streamed for value in part[name]] == logprobs[name]


def test_chunks_are_those_of_the_model(server, model):
    prompt = b"some text, "
    *events, _ = server.events(prompt.decode(), max_tokens=30, echo=True, chunks=True)
    text = "".join(e["choices"][0]["text"] for e in events)
    chunks = [chunk for e in events for chunk in e["choices"][0]["chunks"]]
    data = prompt + generate(model, prompt, temperature=0, max_new_bytes=30)[0]
    mask = model(torch.tensor([[254, *data]])).routing[0].boundary_mask[1:].tolist()
    starts = [at for at in range(len(data) - 1) if mask[at]]  # the last byte has not been fed
    before = [len(data[: at + 1].decode(errors="replace")) - 1 for at in starts]
    assert text == data.decode(errors="replace")
    assert chunks == [[offset, 1] for offset in before]
    assert 3 < len(chunks) < 40


BAD = [
    (b"{", 400, None), (b"\xff\xfe", 400, None), (b"[]", 400, None), (b"[" * 80_000, 400, None),
    ({"prompt": ""}, 400, "prompt"), ({}, 400, "prompt"), ({"prompt": "a" * 201}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"), ({"prompt": [256]}, 400, "prompt"), ({"prompt": ["a", ""]}, 400, "prompt"),
    ({"prompt": "a", "temperature": -1}, 400, "temperature"), ({"prompt": "a", "temperature": "x"}, 400, "temperature"),
    ({"prompt": "a", "temperature": 1e-30}, 400, "temperature"),
    ({"prompt": "a", "frequency_penalty": 10**400}, 400, "frequency_penalty"),
    ({"prompt": "a", "top_k": -1}, 400, "top_k"), ({"prompt": "a", "logprobs": True}, 400, "logprobs"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"prompt": "a", "logit_bias": [1]}, 400, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"3": 10**300}}, 400, "logit_bias"),
    ({"prompt": "a", "max_tokens": 301}, 400, "max_tokens"), ({"prompt": "a", "max_tokens": "9"}, 400, "max_tokens"),
    ({"prompt": "a", "n": 25}, 400, "n"), ({"prompt": "a", "best_of": 3}, 400, "best_of"),
    ({"prompt": "a", "stop": ""}, 400, "stop"), ({"prompt": "a", "stop": [3]}, 400, "stop"),
    ({"prompt": "a", "stop": "\ud800"}, 400, "stop"), ({"prompt": "a", "stop": ["a"] * 17}, 400, "stop"),
    ({"prompt": "a", "seed": -1}, 400, "seed"), ({"prompt": "a", "stream": 1}, 400, "stream"),
    ({"prompt": "a", "top": 1}, 400, "top"), ({"prompt": "a", "\ud800": 1}, 400, "\\ud800"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, 400, "logprobs"), ({"prompt": "a", "model": "gpt"}, 404, "model"),
    ({"prompt": "a" * 200_000}, 413, None),
]  # fmt: skip


def test_mistakes_are_errors_of_openais_form(server):
    for body, status, param in BAD:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = server.client.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (status, param), (body, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert server.client.post("/v1/completions", content=b'{"prompt": "a"}').status_code == 415
    for method, path in (("GET", "/v1/completions"), ("GET", "/nowhere"), ("GET", "/docs"), ("GET", "/v1/models/gpt")):
        response = server.client.request(method, path)
        assert response.status_code in (404, 405)
        assert response.json()["error"]["message"]
    assert server.text("a", max_tokens=3)  # it goes on


def test_models_health_metrics(server):
    assert [m["id"] for m in server.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert server.client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert server.client.get("/health").json() == {"status": "ok"}

    def read(name):
        return sum(float(line.split()[1]) for line in server.client.get("/metrics").text.splitlines()
                   if line.startswith(name + (" " if "{" not in name else "")))  # fmt: skip

    before = read("hnet_new_bytes_total"), read('hnet_responses_total{status="200"}')
    server.ask(max_tokens=7)
    server.ask(temperature=-1)
    assert read("hnet_new_bytes_total") == before[0] + 7
    assert read('hnet_responses_total{status="200"}') == before[1] + 1
    assert (read("hnet_slots"), read("hnet_running"), read("hnet_waiting")) == (4, 0, 0)


def test_token(model):
    with Running(model, token="sesame") as server:
        for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "sesame"}):
            for response in (server.ask(headers=headers), server.client.get("/v1/models", headers=headers),
                             server.client.get("/metrics", headers=headers)):  # fmt: skip
                assert response.status_code == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer sesame"}
        assert server.ask(headers=right, max_tokens=2).status_code == 200
        assert server.client.get("/v1/models", headers=right).status_code == 200
        assert server.client.get("/health").status_code == server.client.get("/").status_code == 200


def held(engine):
    """Steps of the engine wait until the event returned is set."""
    go, step = threading.Event(), engine.step

    def slow():
        assert go.wait(20)
        return step()

    engine.step = slow
    return go


def test_who_leaves_frees_slots_and_a_full_queue_refuses(model):
    with Running(model, Limits(slots=1, queue=2, max_prompt_bytes=200, max_tokens=100_000)) as server:
        streams = [server.events("a", max_tokens=100_000, stop_at_eos=False) for _ in range(2)]
        next(streams[0])  # runs
        thread = threading.Thread(target=lambda: list(zip(streams[1], range(3), strict=False)))
        thread.start()
        server.until(lambda: len(server.worker.texts) == 2)
        full = server.ask("b", n=2)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert full.headers["Retry-After"] == "1"
        streams[0].close()  # the second comes in
        thread.join(20)
        assert not thread.is_alive()
        with pytest.raises(TimeoutError):  # who waits for the whole text may leave too
            _leave(server)
        streams[1].close()
        server.until(server.idle)
        assert server.text("b", max_tokens=20) == offline(model, "b", 20)


def _leave(server):
    try:
        server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 100_000}, timeout=0.2)
    except httpx.ReadTimeout:
        raise TimeoutError from None


def test_time_is_over(model):
    with Running(model, Limits(slots=1, queue=2, max_prompt_bytes=200, max_tokens=100_000, seconds=0.3)) as server:
        choice = server.ask("a", max_tokens=100_000, stop_at_eos=False).json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "time")
        assert 0 < len(choice["text"]) < 100_000
        assert offline(model, "a", 50, stop_at_eos=False)[:20] == choice["text"][:20]
        go = held(server.engine)
        threading.Timer(0.5, go.set).start()
        late = server.ask("a", n=2, max_tokens=5)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")


def test_a_signal_lets_requests_end_and_cuts_them_after_the_grace(model):
    with Running(model, Limits(slots=2, queue=2, max_prompt_bytes=200, max_tokens=100_000), grace=0.7) as server:
        answers = {}

        def ask(count):
            answers[count] = server.ask("ab", max_tokens=count, stop_at_eos=False)

        go = held(server.engine)
        threads = [threading.Thread(target=ask, args=(n,)) for n in (100_000, 20)]
        for thread in threads:
            thread.start()
        server.until(lambda: len(server.worker.texts) == 2)
        server.server.handle_exit(signal.SIGTERM, None)
        assert server.worker.state == "stopping"
        go.set()
        for thread in threads:
            thread.join(20)
        whole = offline(model, "ab", 60, stop_at_eos=False)
        assert answers[20].json()["choices"][0]["text"] == whole[:20]
        cut = answers[100_000].json()["choices"][0]
        assert (cut["finish_reason"], cut["stop_reason"]) == ("length", "shutdown")
        assert cut["text"][:20] == whole[:20]
        server.thread.join(20)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")


def test_logits_that_are_no_numbers_end_their_request_alone():
    model = tiny()
    with torch.no_grad():
        model.embeddings.weight[7] = float("nan")
    with Running(model) as server:
        go = held(server.engine)
        answers = {}

        def ask(prompt):
            answers[prompt] = server.ask(prompt, max_tokens=12, logit_bias={"7": -1000})

        threads = [threading.Thread(target=ask, args=(p,)) for p in ("abc", "a\x07c", "xyz")]
        for thread in threads:
            thread.start()
        server.until(lambda: len(server.worker.texts) == 3)
        go.set()
        for thread in threads:
            thread.join(20)
        bad = answers["a\x07c"]
        assert (bad.status_code, bad.json()["error"]["code"]) == (422, "not_finite")
        for prompt in ("abc", "xyz"):
            assert answers[prompt].json()["choices"][0]["text"] == offline(model, prompt, 12, logit_bias={7: -1000})
        *_, last = server.events("\x07")
        assert last["error"]["code"] == "not_finite"
        assert server.client.get("/health").status_code == 200


def test_an_exception_of_the_model_ends_what_runs_and_not_the_server(model):
    with Running(model) as server:
        step = server.engine.model.step

        def broken(*_):
            raise RuntimeError("a fault")

        server.engine.model.step = broken
        try:
            assert server.ask(max_tokens=5).status_code == 503
            assert server.ask(max_tokens=5).json()["error"]["code"] == "model_failed"
            assert server.client.get("/health").status_code == 200
            server.ask(max_tokens=5)
        finally:
            server.engine.model.step = step
        assert server.client.get("/health").status_code in (200, 503)
        server.until(server.idle)
        assert server.text(max_tokens=5) == offline(model, "abc", 5)
        assert server.client.get("/health").status_code == 200


def test_limits():
    assert LIMITS.texts == 24
    for wrong in (dict(slots=0), dict(queue=-1), dict(seconds=0), dict(seconds=float("nan"))):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
