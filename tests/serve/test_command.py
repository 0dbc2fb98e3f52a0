"""`hnet serve` as a user starts and stops it."""

import re
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

from hnet.cli import main

from .running import httpx, offline, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "mine"
    model = tiny()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.slow
def test_sigterm_lets_running_requests_end_and_cuts_them_after_the_grace(saved):
    folder, model = saved
    command = [sys.executable, "-m", "hnet", "serve", str(folder), "--port", "0", "--grace", "1", "--slots", "2",
               "--max-tokens", "1000000", "--max-prompt-bytes", "50"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)\n", line)
            assert found, line + process.stderr.read()
            answers = {}

            def ask(tokens):
                body = {"prompt": "ab", "max_tokens": tokens, "temperature": 0, "stop_at_eos": False}
                answers[tokens] = httpx.post(found[1] + "/v1/completions", json=body, timeout=60)

            threads = [threading.Thread(target=ask, args=(n,)) for n in (1_000_000, 60)]
            for running, thread in enumerate(threads, 1):
                thread.start()
                while f"hnet_running {running}.0" not in httpx.get(found[1] + "/metrics").text and 60 not in answers:
                    pass
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join(30)
            assert process.wait(30) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    assert answers[60].json()["choices"][0]["text"] == offline(model, "ab", 60, stop_at_eos=False)
    cut = answers[1_000_000].json()["choices"][0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("length", "shutdown")
    assert cut["text"][:20] == offline(model, "ab", 60, stop_at_eos=False)[:20]


def fails(*args):
    result = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def test_others_may_come_in_only_with_a_token_or_when_that_is_said(saved):
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert f"{host} can be reached from other machines: give --token" in fails(saved[0], "--host", host)
    assert "do not go together" in fails(saved[0], "--token", "a", "--no-token")
    assert "--token must not be empty" in fails(saved[0], "--token", "")
    assert "slots must be at least 1" in fails(saved[0], "--slots", 0)
    # past the question of tokens: this address is nobody's here
    assert "cannot listen at 192.0.2.1" in fails(saved[0], "--host", "192.0.2.1", "--no-token")


def test_a_taken_port_is_one_line(saved):
    from hnet.serve.server import listen

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at 127.0.0.1 port {port}" in fails(saved[0], "--port", port)


def test_without_fastapi_the_extra_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [n for n in sys.modules if n == "hnet.serve" or n.startswith("hnet.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'hnet-kernels[serve]'" in fails(saved[0])
