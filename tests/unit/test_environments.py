"""Environments of their own: where they are, and what is said when one isn't there. Nothing is installed."""

import pytest

from pipeline import environments, store
from pipeline.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_absent_environment_says_how_to_get_it():
    assert environments.absent("litert") == "its converter is not installed (`exportyard setup litert`)"


def test_environment_of_another_lock_is_of_another_version(monkeypatch):
    place = environments.folder("litert")
    place.mkdir(parents=True)
    store.write_json(place / environments.MANIFEST, dict(environments.versions("litert")))

    assert environments.absent("litert") is None
    assert environments.make("litert", print) == place  # and nothing is done
    monkeypatch.setattr(environments, "versions", lambda name: {"environment": "another"})
    assert "of another version" in (environments.absent("litert") or "")


def test_environment_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match=r"(?s)unknown environment `literal`.*`litert`"):
        environments.make("literal", print)


def test_lock_names_exact_versions():
    lines = [line for line in environments.lock("litert").read_text().splitlines() if not line.startswith("#")]

    assert all("==" in line for line in lines)
    assert any(line.startswith("torch==2.13.0") for line in lines)
