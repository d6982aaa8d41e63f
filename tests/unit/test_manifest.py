"""The release manifest: what is written is read again, and nothing else than what it says is accepted."""

import json

import pytest

from pipeline import manifest
from pipeline.errors import ReleaseError, UsageError
from tests.releases import TARGETS, write_release

MODEL = "engines/any-echo/model.bin"


@pytest.fixture
def folder(tmp_path):
    write_release(tmp_path / "release", "1.0.0", "engine")
    return tmp_path / "release"


def test_it_is_read_as_it_was_written(folder):
    text = (folder / "manifest.json").read_text()
    assert manifest.parse(text, "here").text() == text
    assert json.loads(text)["engines"]["any-echo"]["parity"]["vs_onnx"][0]["sqnr_db"] == "Infinity"


def test_a_release_is_loaded(folder):
    assert sorted(manifest.load(folder).engines) == sorted(TARGETS)


def test_the_description_of_the_store_may_lie_beside(folder):
    (folder / "artifact.json").write_text("{}")
    assert manifest.load(folder).version == "1.0.0"


@pytest.mark.parametrize("name", [MODEL, "golden.safetensors"])
def test_a_changed_byte_is_found(folder, name):
    path = folder / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ReleaseError, match=f"`{name}` has other bytes"):
        manifest.load(folder)


def test_a_truncated_file_is_found(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReleaseError, match=f"`{MODEL}` has 18 bytes, the manifest says 19"):
        manifest.load(folder)


def test_a_missing_file_is_found(folder):
    (folder / MODEL).unlink()
    with pytest.raises(ReleaseError, match=f"`{MODEL}` is missing"):
        manifest.load(folder)


def test_a_link_is_not_a_file(folder, tmp_path):
    (folder / MODEL).rename(tmp_path / "elsewhere")
    (folder / MODEL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReleaseError, match=f"`{MODEL}` is missing"):
        manifest.load(folder)


@pytest.mark.parametrize("name", ["notes.txt", "engines/any-echo/extra.so", "engines/other/model.bin"])
def test_a_file_more_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ReleaseError, match=f"`{name}` is not part of the release"):
        manifest.load(folder)


def test_some_targets_are_loaded_alone(folder):
    (folder / "engines/linux-echo/model.bin").unlink()
    assert manifest.load(folder, ["any-echo"]).recipe == "toy"
    with pytest.raises(ReleaseError, match=r"`engines/linux-echo/model\.bin` is missing"):
        manifest.load(folder)


def test_a_misspelt_target_gets_the_nearest(folder):
    with pytest.raises(UsageError, match="did you mean `any-echo`"):
        manifest.load(folder, ["any-ehco"])


def test_a_skipped_target_says_why(folder):
    with pytest.raises(ReleaseError, match="no engine for `web-any-echo`: not built here: no browser"):
        manifest.load(folder, ["web-any-echo"])


def test_a_folder_without_a_manifest_is_no_release(tmp_path):
    with pytest.raises(ReleaseError, match=r"there is no `manifest\.json`"):
        manifest.load(tmp_path)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "engines//x", "a\\b", ""])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    content = json.loads((folder / "manifest.json").read_text())
    content["golden"]["file"]["path"] = path
    with pytest.raises(ReleaseError, match="is not a plain path below the release folder"):
        manifest.parse(json.dumps(content), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"engines": None}, "engines"),
    ],
)
def test_another_form_is_refused(folder, change, message):
    content = json.loads((folder / "manifest.json").read_text()) | change
    with pytest.raises(ReleaseError, match=f"`here` is not a release manifest: {message}"):
        manifest.parse(json.dumps(content), "here")


def test_half_a_manifest_is_refused(folder):
    text = (folder / "manifest.json").read_text()
    with pytest.raises(ReleaseError, match="is not a release manifest"):
        manifest.parse(text[: len(text) // 2], "here")


def test_a_file_listed_twice_is_refused(folder):
    content = json.loads((folder / "manifest.json").read_text())
    content["engines"]["any-echo"]["files"] *= 2
    with pytest.raises(ReleaseError, match=f"lists `{MODEL}` twice"):
        manifest.parse(json.dumps(content), "here")
