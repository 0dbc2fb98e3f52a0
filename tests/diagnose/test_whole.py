"""What the text says of what the log says."""

from hnet.diagnose.runs import read_log
from hnet.diagnose.whole import examine_run

from .logs import after, healthy_rows, write_run
from .test_texts import prose


def examined(tmp_path, held_out):
    for name, texts in {"text": [prose(i) for i in range(60)], "held_out": held_out}.items():
        (tmp_path / name).mkdir()
        for i, t in enumerate(texts):
            (tmp_path / name / f"{i:03d}.txt").write_bytes(t)
    rows = healthy_rows()
    for r in after(rows, 0):
        r["bytes"] = 300 * r["step"]
        if "val_ce" in r:
            r["val_ce"] = 1.3 * r["ce"]
    data = {"data": [str(tmp_path / "text")], "val_data": [str(tmp_path / "held_out")]}
    found = examine_run(read_log(write_run(tmp_path / "a", rows, **data))).findings
    return next(f for f in found if f.name == "split_shift")


def test_a_gap_that_the_documents_do_not_explain_is_a_note(tmp_path):
    f = examined(tmp_path, [prose(i) for i in range(100, 110)])
    assert f.severity == "note"
    assert f.keys == {"eval_bytes": 65536}
    assert "apart before anything could be learnt" in f.evidence[0]
    assert "differ no more than documents do" in f.evidence[1]


def test_a_gap_that_they_do_explain_is_a_warning(tmp_path):
    assert examined(tmp_path, [b"0123456789 " * 200] * 10).severity == "warning"
