import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hnet.data.corpus import Corpus
from hnet.data.pack_stream import PackStream
from hnet.data.workers import Workers, with_workers
from tests.test_data import key, random_corpus, take

ROOT = Path(__file__).parents[2]


def stream(rank=0, world_size=1):
    return PackStream(random_corpus(), 50, 37, 5, rank, world_size)


@pytest.fixture
def workers():
    """Workers(...) that are closed at the end."""
    made = []

    def make(*args):
        made.append(Workers(*args))
        return made[-1]

    yield make
    for w in made:
        w.close()


@pytest.mark.parametrize("count", [1, 3])
def test_same_packs_and_states_as_without(workers, count):
    plain, ahead = stream(1, 2), workers(stream(1, 2), count)
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(40):
        assert key(next(ahead)) == key(next(plain))
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epochs == plain.epochs


def test_resume_from_with_to_without_and_back(workers):
    plain = stream()
    want = take(plain, 30)
    ahead = workers(stream(), 2)
    assert take(ahead, 11) == want[:11]
    state = ahead.state_dict()
    later = stream()
    later.load_state_dict(state)
    assert take(later, 4) == want[11:15]
    again = workers(stream(), 3)
    again.load_state_dict(later.state_dict())
    assert take(again, 5) == want[15:20]
    ahead.load_state_dict(again.state_dict())  # while it runs
    assert take(ahead, 5) == want[20:25]
    ahead.close()
    assert take(ahead, 5) == want[25:30]  # goes on


class Broken(Corpus):
    def document_error(self):
        raise ValueError("x.jsonl line 7 is not JSON")

    def windows(self, *args):
        for i, window in enumerate(super().windows(*args)):
            if i == 1:
                self.document_error()
            yield window


def test_an_error_in_a_worker_is_raised_here(workers):
    c = random_corpus()
    ahead = workers(PackStream(Broken(c.buffer, c.begin, c.end), 50, 37, 5), 2)
    with pytest.raises(ValueError, match="line 7 is not JSON") as e:
        take(ahead, 1000)
    assert "document_error" in str(e.value.__cause__)  # where it came from
    assert not any(p.is_alive() for p in ahead._processes)


def test_a_killed_worker_is_noticed(workers):
    ahead = workers(stream(), 2)
    take(ahead, 2)
    os.kill(ahead._processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="data worker 0 died with exit code -9"):
        take(ahead, 1000)
    assert not any(p.is_alive() for p in ahead._processes)


def test_close_and_garbage_end_the_workers():
    for end in (lambda w: w.close(), lambda w: None):
        ahead = Workers(stream(), 2)
        take(ahead, 3)
        processes = list(ahead._processes)
        end(ahead)
        del ahead
        assert not any(p.is_alive() for p in processes)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["return", "raise ValueError", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 2)"])
def test_no_worker_outlives_the_process(end):
    code = f"""
import os
from hnet.data.workers import Workers
from tests.data_io.test_workers import stream, take
def main():
    w = Workers(stream(), 3)
    take(w, 4)
    print(*(p.pid for p in w._processes), flush=True)
    {end}
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    pids = [int(p) for p in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def test_ctrl_c_in_the_terminal_leaves_them_to_the_main_process(workers):
    ahead, plain = workers(stream(), 2), stream()
    assert take(ahead, 3) == take(plain, 3)
    for p in ahead._processes:
        os.kill(p.pid, signal.SIGINT)
    assert take(ahead, 10) == take(plain, 10)


def test_a_stream_travels_to_processes_that_are_not_forked():
    a, b = stream(), stream()
    take(a, 5)
    there = pickle.loads(pickle.dumps(a))
    there.load_state_dict(a.state_dict())
    take(b, 5)
    assert take(there, 40) == take(b, 40)


def test_number_of_workers():
    s = stream()
    assert with_workers(s, 0) is s
    ahead = with_workers(s, 2)
    assert isinstance(ahead, Workers)
    assert np.array_equal(ahead.corpus.buffer, s.corpus.buffer)
    with pytest.raises(ValueError, match="num_workers must be at least 0, got -1"):
        with_workers(s, -1)
