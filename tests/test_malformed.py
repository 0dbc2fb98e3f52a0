"""Configurations and logs nobody meant: each is a UserError that names its place, never another exception."""

import json
import re
from pathlib import Path

import pytest

from hnet import HNetConfig
from hnet.chunk_lm.config import ChunkLMConfig
from hnet.chunk_lm.train_config import ChunkLMTrainConfig
from hnet.cli.train import configuration
from hnet.config import toml
from hnet.config.architecture import from_shorthand, targets
from hnet.config.keys import fields, read_toml
from hnet.diagnose.report import diagnose
from hnet.diagnose.runs import read_log
from hnet.errors import UserError
from hnet.train.config import TrainConfig

from .diagnose.logs import healthy_rows
from .diagnose.test_runs import LOGS

hypothesis = pytest.importorskip("hypothesis")  # a borrowed GPU machine may lack it
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

CLASSES = [TrainConfig, ChunkLMTrainConfig]


def made_up(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("malformed")


def refused(call, *args, naming=""):
    """The message of the UserError it must end in."""
    with pytest.raises(UserError) as e:
        call(*args)
    assert naming in str(e.value)
    return str(e.value)


def taken_or_refused(call, *args):
    """(what it returns, None) or (None, the message of its UserError)."""
    try:
        return call(*args), None
    except UserError as e:
        return None, str(e)


# --- config.toml ------------------------------------------------------------------------------------------------------

# Nothing TOML has fits a key of another kind, but an integer a float, and one value a list of its kind.
VALUES = {
    "int": st.integers(-(2**70), 2**70),
    "float": st.floats(),
    "str": st.text(max_size=5),
    "bool": st.booleans(),
    "table": st.dictionaries(st.text("ab", min_size=1, max_size=2), st.integers(0, 9), max_size=2),
    "date": st.dates(),
}


def kinds(f):
    """What may stand for a key: kinds of VALUES, and whether a list may."""
    if str(f.type) == "list[str | dict]":
        return {"str", "table"}, True
    first, _, other = str(f.type).partition(" | ")
    plain = first.removeprefix("list[").removesuffix("]")
    return {plain, *(["int"] if plain == "float" else []), *([other] if other else [])}, first.startswith("list")


@st.composite
def wrong_types(draw):
    cls = draw(st.sampled_from(CLASSES))
    f = draw(st.sampled_from(fields(cls)))
    fitting, a_list = kinds(f)
    kind = draw(st.sampled_from(sorted(VALUES.keys() - fitting)))
    value = draw(VALUES[kind])
    if draw(st.booleans()):
        value = [value]
    elif not a_list and draw(st.booleans()):
        value = [draw(VALUES[min(fitting)])]  # a list of what the key alone could be
    return cls, f.name, value


@made_up(150)
@given(wrong_types())
def test_a_toml_value_of_another_type(folder, made):
    cls, name, value = made
    path = folder / "wrong.toml"
    path.write_text(toml.dumps({name: value}))
    refused(read_toml, path, cls, naming=f"wrong.toml: {name} must be ")


@made_up(50)
@given(st.sampled_from(CLASSES), st.text(min_size=1, max_size=12), st.integers())
def test_an_unknown_key(folder, cls, name, value):
    path = folder / "unknown.toml"
    name += "?"
    path.write_text(toml.dumps({name: value}))
    refused(read_toml, path, cls, naming="unknown key ")
    refused(configuration, cls, str(path), None, {}, naming="unknown key ")


@made_up(50)
@given(st.sampled_from(CLASSES), st.binary(max_size=40), st.sampled_from([b"= 3", b"[[", b"a = ", b"\xff", b"a = 1 2"]))
def test_what_is_no_toml(folder, cls, garbage, end):
    path = folder / "garbage.toml"
    path.write_bytes(garbage.replace(b"#", b"").replace(b'"', b"").replace(b"'", b"") + b"\n" + end)
    message = refused(read_toml, path, cls, naming="garbage.toml")
    assert re.search("is not TOML|is not text", message)


def test_toml_nested_beyond_reason(folder):
    (folder / "deep.toml").write_text("a = " + "[" * 100_000)
    refused(read_toml, folder / "deep.toml", TrainConfig, naming="is not TOML")


RANGED = [
    (cls, f) for cls in CLASSES for f in fields(cls)
    if f.metadata["low"] is not None or f.metadata["choices"] or str(f.type).startswith(("float", "list[float"))
]  # fmt: skip


@st.composite
def out_of_range(draw):
    cls, f = draw(st.sampled_from(RANGED))
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if choices:
        value = draw(st.text(max_size=8).filter(lambda t: t not in choices))
    elif low is not None:
        whole = str(f.type) == "int"
        below = st.integers(max_value=int(low) - 1) if whole else st.floats(max_value=low, exclude_max=True)
        above = st.just(float("nan")) if high is None else st.floats(min_value=high, exclude_min=True)
        value = draw(below if whole else st.one_of(below, above))
    else:
        value = draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    return cls, f, [value] if str(f.type).startswith("list") else value


@made_up(150)
@given(out_of_range())
def test_a_key_out_of_range(made):
    cls, f, value = made
    refused(cls(**{"data": ["x"], f.name: value}).validate, naming=f"{f.name} must be ")


@st.composite
def keys_of_the_right_type(draw):
    """Up to three keys with anything their type allows."""
    cls = draw(st.sampled_from(CLASSES))
    names = draw(st.lists(st.sampled_from(fields(cls)), min_size=1, max_size=3, unique_by=lambda f: f.name))
    values = {}
    for f in names:
        plain = sorted(kinds(f)[0] - {"str"} or {"str"})
        near = st.one_of(st.integers(-2, 9), st.sampled_from([0.5, 2**62])) if plain != ["str"] else VALUES["str"]
        one = st.one_of(near, *(VALUES[k] for k in plain))
        if plain[0] == "bool":
            one = st.booleans()
        if plain == ["int"]:
            one = one.filter(lambda v: isinstance(v, int))
        values[f.name] = draw(st.lists(one, max_size=3) if kinds(f)[1] else one)
    return cls, values


@made_up(200)
@given(keys_of_the_right_type())
def test_keys_of_the_right_type_are_taken_or_refused(made):
    cls, values = made
    preset = {"preset": "tiny"} if cls is TrainConfig else {}
    config, message = taken_or_refused(cls(**{"data": ["x"], **preset, **values}).validate)
    assert config is not None or message


# --- shorthands -------------------------------------------------------------------------------------------------------

NUMBERS = st.lists(st.integers(-3, 300), max_size=4)


@made_up(80)
@given(st.text("mMtTcCx/123 -", max_size=14), NUMBERS, NUMBERS, NUMBERS, NUMBERS)
def test_shorthands_are_taken_or_refused(arch, d_model, heads, windows, d_intermediate):
    kwargs = {"heads": heads, "windows": windows, "d_intermediate": d_intermediate}
    c, message = taken_or_refused(lambda: from_shorthand(arch, d_model, **kwargs))
    assert message or c.num_stages == len(arch.split()) == len(d_model)


@made_up(40)
@given(st.text("abx/+ ", min_size=1, max_size=9), NUMBERS)
def test_a_shorthand_of_no_layout(arch, d_model):
    refused(from_shorthand, arch, d_model)


@made_up(60)
@given(st.lists(st.floats(max_value=1.0), max_size=4), st.integers(0, 3))
def test_targets_at_most_one(compression, routed):
    if len(compression) == routed == 0 or (routed == 0 and compression == [1.0]):
        return
    refused(targets, compression, routed, naming="compression must be ")


# --- config.json ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 300), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=5,
)
MODELS = {
    HNetConfig: [HNetConfig.preset(n).to_dict() for n in ("tiny", "hnet_2stage_L", "laptop")],
    ChunkLMConfig: [ChunkLMConfig().to_dict()],
}


def places(d, at=()):
    """Every key and list element inside, by its path."""
    for key in d if isinstance(d, dict) else range(len(d)):
        yield (*at, key)
        if isinstance(d[key], dict | list):
            yield from places(d[key], (*at, key))


@made_up(200)
@given(st.data())
def test_a_changed_model_json_is_taken_or_refused(folder, data):
    """Anything in the place of anything; one that is taken can be built from what it says of itself."""
    cls = data.draw(st.sampled_from(list(MODELS)))
    d = json.loads(json.dumps(data.draw(st.sampled_from(MODELS[cls]))))
    *way, last = data.draw(st.sampled_from(list(places(d))))
    inner = d
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    path = folder / "model.json"
    path.write_text(json.dumps(d))
    made, message = taken_or_refused(cls.from_json, path)
    assert message.startswith(str(path)) if made is None else cls.from_dict(made.to_dict()) == made


@made_up(60)
@given(st.data())
def test_a_model_json_cut_short_or_with_another_key(folder, data):
    cls = data.draw(st.sampled_from(list(MODELS)))
    d = data.draw(st.sampled_from(MODELS[cls]))
    text = json.dumps(d)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text) - 1))]
    else:
        text = json.dumps({**d, data.draw(st.text(max_size=5)) + "?": 1})
    (folder / "model.json").write_text(text)
    refused(cls.from_json, folder / "model.json", naming="model.json")


@made_up(40)
@given(st.sampled_from(list(MODELS)), JSON.filter(lambda v: not isinstance(v, dict)))
def test_a_model_json_that_is_no_object(folder, cls, value):
    (folder / "model.json").write_text(json.dumps(value))
    refused(cls.from_json, folder / "model.json", naming="must be a JSON object")


# --- logs -------------------------------------------------------------------------------------------------------------

OURS = "".join(json.dumps(r) + "\n" for r in healthy_rows(12))
TEXTS = [text for text, _ in LOGS.values()] + [OURS, "step,loss,lr\n1,2.5,1e-3\n2,2.4,1e-3\n3,nan,1e-3\n"]
NAMES = ["train.log", "metrics.jsonl", "loss.csv", "trainer_state.json", "out.txt"]


def read_and_diagnose(path):
    return diagnose(read_log(path))


@made_up(60)
@given(st.sampled_from(NAMES), st.binary(max_size=60), st.binary(max_size=60))
def test_a_binary_log(folder, name, before, after):
    path = folder / name
    path.write_bytes(before + b"\0" + after)
    assert re.search("is not text|no training log recognised", refused(read_log, path, naming=name))


@made_up(80)
@given(
    st.sampled_from(NAMES), st.text(st.characters(exclude_characters="0123456789\0", exclude_categories=["Cs", "N"]))
)
def test_a_log_without_a_number(folder, name, text):
    path = folder / name
    path.write_text(text)
    refused(read_log, path, naming=name)


@made_up(120)
@given(st.data())
def test_a_spoiled_log_is_read_or_refused(folder, data):
    """Truncated anywhere, two logs line by line in one, lines twice or reversed, bytes replaced: what is read is
    diagnosed without harm."""
    a, b = data.draw(st.sampled_from(TEXTS)), data.draw(st.sampled_from(TEXTS))
    how = data.draw(st.sampled_from(["cut", "interleaved", "garbled", "shuffled"]))
    if how == "cut":
        spoiled = a.encode()[data.draw(st.integers(0, len(a))) :][: data.draw(st.integers(0, len(a)))]
    elif how == "interleaved":
        lines = [*a.splitlines(True), *b.splitlines(True)]
        spoiled = "".join(data.draw(st.permutations(lines[:12]))).encode()
    elif how == "shuffled":
        spoiled = (a + a + "".join(reversed(b.splitlines(True)))).encode()
    else:
        spoiled = bytearray(a.encode())
        for at in data.draw(st.lists(st.integers(0, len(spoiled) - 1), max_size=30)):
            spoiled[at] = data.draw(st.integers(1, 255))
    path = folder / data.draw(st.sampled_from(NAMES))
    path.write_bytes(bytes(spoiled))
    found, message = taken_or_refused(read_and_diagnose, path)
    assert found is not None or path.name in message


@made_up(40)
@given(st.data())
def test_rows_with_anything_in_them(folder, data):
    """metrics.jsonl and trainer_state.json with values that are no numbers, beside a config with values of any type."""
    rows = [dict(r) for r in healthy_rows(6)]
    for _ in range(data.draw(st.integers(1, 4))):
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.sampled_from([*row, "event", "message"]))] = data.draw(JSON)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    key = data.draw(st.sampled_from([f.name for f in fields(TrainConfig)]))
    value = data.draw(st.one_of(*VALUES.values(), st.lists(st.integers(-1, 3), max_size=2)))
    (run / "config.toml").write_text(toml.dumps({"steps": 6, key: value}))
    found, message = taken_or_refused(read_and_diagnose, run)
    assert found is not None or str(run) in message


@pytest.mark.parametrize(("d_model", "heads"), [([0], []), ([-1], []), ([64], [0])])
def test_a_shorthand_without_width_or_heads(d_model, heads):
    refused(lambda: from_shorthand("T1", d_model, heads=heads), naming="must hold integers >= 1")


@pytest.mark.parametrize(
    "row",
    [
        '{"step": 1, "loss": 1%s}' % ("0" * 400), '{"step": 1%s, "loss": 2.5}' % ("0" * 400), "{'loss': 2.5, []: 1}",
        "{'loss': %s1}" % ("[" * 300), '{"loss": %s' % ("[" * 100_000), "{'loss': 2.5, 'x': '\\:'}", '{"loss": 1e999}',
    ],
    ids=["large", "late", "unhashable", "nested", "deep", "escape", "infinite"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log"])
def test_a_row_no_float_can_hold(folder, name, row):
    """Beside one that is whole, which is read."""
    (folder / name).write_text('{"step": 7, "loss": 2.0}\n' + row + "\n")
    log = read_log(folder / name)
    assert 7 in log.step
    diagnose(log)


def test_a_config_whose_model_config_is_a_number(folder):
    (folder / "numbers.toml").write_text("model_config = 1\n")
    read_and_diagnose(folder / "numbers.toml")


def test_a_folder_and_a_file_that_are_nothing(folder):
    (folder / "nothing").mkdir()
    refused(read_log, folder / "nothing", naming="holds no metrics.jsonl")
    refused(read_log, Path("/nowhere/log"), naming="does not exist")
    (folder / "run.tfevents.1").write_bytes(b"x")
    refused(read_log, folder / "run.tfevents.1", naming="TensorBoard event file")
