"""benchmarks/data_streaming.py on a small set: what its contenders read is what was generated."""

import pytest

from benchmarks.data_streaming import PACK, generate, read
from hnet.data.files import read_corpus
from tests.data_io.test_files import optional


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=optional("pyarrow"))])
def test_generated_files_are_read(tmp_path, kind):
    made = generate(tmp_path, kind, 3_000_000)
    corpus = read_corpus([tmp_path])
    assert (len(corpus), corpus.num_bytes) == (made["rows"], made["bytes"])
    assert 3_000_000 <= made["bytes"] < 4_000_000
    for stream in ("on", "off"):
        found = read(str(tmp_path), stream, 10 * PACK, 1, 2)
        assert found["bytes"] == 5 * PACK
        assert found["shards"] == (2 if (stream, kind) == ("on", "jsonl") else 1)
        assert 0 < found["first_pack_seconds"] <= found["seconds"]
