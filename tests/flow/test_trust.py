"""A key, from the publisher to the device: what it signs arrives whole, and nothing else is let in."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import cli, puller, store, trust, verification

PUBLISH = ("publish", "tiny", "--target", "good")


@pytest.fixture
def key(tmp_path, monkeypatch):
    monkeypatch.delenv(trust.PUBLIC_KEY, raising=False)
    file = tmp_path / "keys" / "key"
    trust.keygen(file)
    monkeypatch.setenv(trust.SIGNING_KEY, str(file))
    return file


def run(bench, *arguments):
    return cli.invoke([*arguments, "-C", str(bench.root)])


def pull(bench, to, *arguments):
    return run(bench, "pull", "tiny", "--to", str(to), *arguments)


def damage_papers(root):
    """Make another version of the provenance in DVC's cache and remote. No digest in git covers it."""
    papers = (root / "artifacts/tiny/release/provenance.json").read_bytes()
    objects = [path for path in root.parent.rglob("*") if len(path.name) == 30 and path.is_file()]
    stored = [path for path in objects if path.read_bytes() == papers]
    assert stored
    for path in stored:
        path.chmod(0o644)
        path.write_bytes(papers.replace(b'"1.0.0"', b'"1.0.1"'))


def test_from_the_publisher_to_the_device(bench, key, tmp_path, capsys, monkeypatch):
    assert run(bench, *PUBLISH) == 0
    device = tmp_path / "device"
    assert pull(bench, device) == 0
    assert "its signature was not checked" in capsys.readouterr().err
    assert pull(bench, device, "--key", f"{key}.pub") == 0
    assert "signature and digests verified" in capsys.readouterr().out
    found = verification.verify(device, key.with_name("key.pub"), "tiny@1.0.0")
    assert [check.state for check in found.checks] == ["verified"] * 4
    said = json.loads((device / "provenance.json").read_text())["predicate"]
    commit = found.manifest.source.commit
    assert said["buildDefinition"]["resolvedDependencies"][0] == {"name": "source", "digest": {"gitCommit": commit}}
    assert {"torch", "onnx", "onnxscript"} <= set(said["runDetails"]["builder"]["version"])

    shelf = str(tmp_path / "registry")
    Path(shelf).mkdir()
    assert run(bench, "mirror", "tiny", "--registry", shelf) == 0
    assert run(bench, "promote", "tiny@1.0.0", "prod", "--registry", shelf) == 0
    asked = ["tiny#prod", "--from", shelf, "--to", str(tmp_path / "edge"), "--key"]
    assert puller.main([*asked, f"{key}.pub"]) == 0
    assert verification.verify(tmp_path / "edge", key.with_name("key.pub")).manifest == found.manifest

    other = trust.keygen(tmp_path / "other")
    assert puller.main([*asked, str(other)]) == 12
    monkeypatch.setenv(trust.PUBLIC_KEY, str(other))
    capsys.readouterr()
    assert pull(bench, tmp_path / "none") == 12
    assert "does not fit the key" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert pull(bench, device) == 12, "what is there already is not taken on trust, either"
    assert verification.verify(device, key.with_name("key.pub"))

    damage_papers(bench.root)
    assert pull(bench, tmp_path / "none", "--key", f"{key}.pub") == 12
    assert "nothing was installed" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    secret = key.read_text().splitlines()[1]
    assert not [path for path in bench.root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_release_that_the_key_has_not_signed_is_signed_under_the_next_version(
    bench, key, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv(trust.SIGNING_KEY)
    assert run(bench, *PUBLISH) == 0
    capsys.readouterr()
    assert pull(bench, tmp_path / "device", "--key", f"{key}.pub") == 12
    assert "`tiny@1.0.0` is not signed" in capsys.readouterr().err
    assert pull(bench, tmp_path / "device") == 0
    monkeypatch.setenv(trust.SIGNING_KEY, str(key))
    assert run(bench, *PUBLISH) == 0
    assert pull(bench, tmp_path / "device", "--key", f"{key}.pub") == 0
    assert verification.verify(tmp_path / "device", key.with_name("key.pub")).manifest.version == "1.0.1"

    trust.keygen(tmp_path / "newer")  # the first one is lost, say
    monkeypatch.setenv(trust.SIGNING_KEY, str(tmp_path / "newer"))
    assert run(bench, *PUBLISH) == 0
    assert run(bench, *PUBLISH) == 0
    assert bench.tags() == [f"tiny@v1.0.{number}" for number in range(3)]


def test_a_key_that_is_not_there_publishes_nothing(bench, key, capsys):
    shutil.rmtree(key.parent)
    assert run(bench, *PUBLISH) == 12
    assert "can't read the key" in capsys.readouterr().err
    assert bench.tags() == []
    assert store.peek(bench.root / "artifacts/tiny/release") is None
