"""The store's promises: all or nothing, verified before reuse, nothing lost when something fails."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import digest, store
from pipeline.errors import BuildError, StoreError
from pipeline.store import Key


def write(text):
    def work(out: Path):
        (out / "a.txt").write_text(text)
        (out / "deep").mkdir()
        (out / "deep" / "b.bin").write_bytes(b"\0" * 10)
        return {"length": len(text)}

    return work


def refuse(out: Path):
    raise AssertionError("must not be called")


def test_the_second_make_does_nothing(tmp_path):
    key = Key("onnx", {"program": "abc"}, {"opset": 20}, {"torch": "1"})
    first = store.make(tmp_path / "x", key, write("hello"))
    second = store.make(tmp_path / "x", key, refuse)
    assert (first.state, second.state) == ("built", "cached")
    assert second.stored.digest == first.stored.digest
    assert second.stored.artifact.facts == {"length": 5}
    assert second.stored.size_bytes == 15


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (Key("onnx", {"program": "def"}, {"opset": 20}, {"torch": "1"}), "input program changed"),
        (Key("onnx", {"program": "abc"}, {"opset": 21}, {"torch": "1"}), "setting opset changed"),
        (Key("onnx", {"program": "abc"}, {"opset": 20}, {"torch": "2"}), "torch 1 -> 2"),
        (Key("onnx", {"program": "abc"}, {}, {"torch": "1"}), "setting opset is gone"),
    ],
)
def test_whatever_decides_the_bytes_makes_it_stale(tmp_path, key, reason):
    store.make(tmp_path / "x", Key("onnx", {"program": "abc"}, {"opset": 20}, {"torch": "1"}), write("hello"))
    assert store.state_of(tmp_path / "x", key) == (None, reason)
    assert store.make(tmp_path / "x", key, write("again")).state == "built"
    assert (tmp_path / "x" / "a.txt").read_text() == "again"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "a.txt").write_text("jello"), "`a.txt` has other bytes"),
        (lambda folder: (folder / "a.txt").write_text("hell"), "`a.txt` has 4 bytes, expected 5"),
        (lambda folder: (folder / "deep" / "b.bin").unlink(), "`deep/b.bin` is missing"),
        (lambda folder: (folder / "new").write_text(""), "`new` does not belong there"),
    ],
)
def test_damage_is_noticed_and_repaired_and_said(tmp_path, harm, said):
    key = Key("onnx")
    store.make(tmp_path / "x", key, write("hello"))
    harm(tmp_path / "x")
    with pytest.raises(StoreError, match=said):
        store.load(tmp_path / "x")
    made = store.make(tmp_path / "x", key, write("hello"))
    assert made.state == "rebuilt"
    assert said in made.reason
    store.load(tmp_path / "x")


@pytest.mark.parametrize("failure", [BuildError("no"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    store.make(tmp_path / "x", Key("onnx", config={"n": 1}), write("old"))

    def work(out: Path):
        (out / "half").write_text("half")
        raise failure

    with pytest.raises(type(failure)):
        store.make(tmp_path / "x", Key("onnx", config={"n": 2}), work)
    assert store.load(tmp_path / "x").file("a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["x"]


@pytest.mark.filterwarnings("ignore:os.fork")  # other tests of this process may have loaded what minds it
def test_a_killed_process_leaves_nothing_that_counts(tmp_path):
    child = os.fork()
    if child == 0:

        def work(out: Path):
            (out / "half").write_text("half")
            os.kill(os.getpid(), 9)
            return {}

        store.make(tmp_path / "x", Key("onnx"), work)
    os.waitpid(child, 0)
    assert store.peek(tmp_path / "x") is None
    assert store.make(tmp_path / "x", Key("onnx"), write("hello")).state == "built"
    assert not list(tmp_path.glob(".*.tmp"))


def test_killed_between_the_two_renames_the_old_one_comes_back(tmp_path):
    store.make(tmp_path / "x", Key("onnx"), write("hello"))
    (tmp_path / "x").rename(tmp_path / ".x.old")
    assert store.make(tmp_path / "x", Key("onnx"), refuse).state == "cached"


def test_a_full_disk_is_said_and_harms_nothing(tmp_path):
    store.make(tmp_path / "x", Key("onnx", config={"n": 1}), write("old"))

    def work(out: Path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="no space left on the disk") as caught:
        store.make(tmp_path / "x", Key("onnx", config={"n": 2}), work)
    assert "df -h" in caught.value.hint
    assert store.load(tmp_path / "x").file("a.txt").read_text() == "old"


def test_a_stage_that_writes_nothing_is_refused(tmp_path):
    with pytest.raises(StoreError, match="wrote nothing"):
        store.make(tmp_path / "x", Key("onnx"), lambda out: {})


def test_load_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match="holds no artifact"):
        store.load(tmp_path / "x")


def test_write_whole_replaces_in_one_step(tmp_path):
    store.write_whole(tmp_path / "deep" / "page", "one")
    store.write_whole(tmp_path / "deep" / "page", "two")
    assert (tmp_path / "deep" / "page").read_text() == "two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_the_digest_does_not_depend_on_the_order_of_keys(value):
    turned = dict(reversed(list(value.items())))
    assert digest.of_json(turned) == digest.of_json(value)
    assert Key("onnx", config=value).digest == Key("onnx", config=turned).digest
