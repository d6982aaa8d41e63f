"""The exchange on a folder: one that is away is waited for and never made anew, and damage is removed all at once."""

import threading

import pytest

from pipeline import exchange, handover, store
from pipeline.errors import UnavailableError
from pipeline.exchange import AbsentError, Exchange
from pipeline.store import Key

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "remote"
    folder.mkdir()
    files = fsspec.filesystem("file", auto_mkdir=False)
    return Exchange(files, f"{folder}/{exchange.FOLDER}", tmp_path / "cache", folder)


@pytest.fixture
def stored(tmp_path):
    def work(out):
        for name in ("one", "two", "three"):
            (out / name).write_text(name)
        return {}

    return store.make(tmp_path / "made", Key("engine"), work).stored


def test_a_folder_that_is_away_is_neither_empty_nor_made_anew(shared, stored, tmp_path, monkeypatch):
    reference = shared.put(stored)
    away = shared.folder.rename(tmp_path / "away")
    monkeypatch.setenv(exchange.PATIENCE_S, "0")
    for ask in (
        lambda: shared.put(stored),
        lambda: shared.reference(Key("engine")),
        lambda: shared.get(reference, tmp_path / "got"),
        lambda: shared.note("a"),
        lambda: shared.leave("a", {}),
    ):
        with pytest.raises(UnavailableError, match=r"can't be used: FileNotFoundError: there is no folder .*/remote`"):
            ask()
    assert not shared.folder.exists()
    monkeypatch.setenv(exchange.PATIENCE_S, "20")
    back = threading.Timer(0.2, lambda: away.rename(shared.folder))
    back.start()
    assert shared.get(reference, tmp_path / "got").digest == stored.digest
    back.join()


def test_all_that_is_damaged_is_removed_at_once_and_handed_over_again(shared, stored, tmp_path):
    reference = shared.put(stored)
    for path in (shared.folder / "exportyard/files").glob("*/*"):
        if path.read_text() in ("one", "three"):
            path.write_text("bad")
    with pytest.raises(AbsentError, match="was damaged, and is removed"):
        shared.get(reference, tmp_path / "got")
    assert not (tmp_path / "got").exists()
    shared.put(stored)
    assert shared.get(reference, tmp_path / "got").digest == stored.digest


def test_what_a_killed_run_has_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    left = tmp_path / ".scratch/runs/left"
    (left / "half").mkdir(parents=True)
    left.with_suffix(".lock").touch()
    with handover.scratch(tmp_path, "first") as first:
        first.mkdir()
        assert not left.exists()
        with handover.scratch(tmp_path, "second"):
            assert first.exists()
    assert [*left.parent.iterdir()] == []
