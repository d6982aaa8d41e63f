"""What is refused: every change to a release, and every release that somebody else has signed."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from random import Random

import pytest

from pipeline import attest, cli, manifest, trust, verification
from pipeline.errors import ReleaseError
from tests.releases import COMMIT, TARGETS, write_release

ENGINE = f"engines/{TARGETS[0]}/model.bin"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two pairs of keys, and signed releases of two versions."""
    folder = tmp_path_factory.mktemp("signed")
    for name in ("key", "other"):
        trust.keygen(folder / name)
    write_release(folder / "one", "1.0.0", "one", key=folder / "key")
    write_release(folder / "two", "1.1.0", "two", key=folder / "key")
    return folder


@pytest.fixture
def release(base, tmp_path):
    """A signed release, to be damaged."""
    return shutil.copytree(base / "two", tmp_path / "release")


@pytest.fixture
def key(base):
    return base / "key.pub"


def states(found):
    return {check.what: check.state for check in found.checks}


ALL_GOOD = dict.fromkeys(("files", "provenance", "SBOM", "signature"), "verified")


def test_a_signed_release(release, key):
    found = verification.verify(release, key, "toy@1.1.0")
    assert (found.manifest.version, found.targets, states(found)) == ("1.1.0", TARGETS, ALL_GOOD)


def test_a_release_with_some_targets(release, key):
    shutil.rmtree(release / "engines" / TARGETS[1])
    found = verification.verify(release, key)
    assert (found.targets, states(found)) == (TARGETS[:1], ALL_GOOD)


def test_the_note_of_the_store_is_no_part_of_it(release, key):
    (release / "artifact.json").write_text("{}")
    assert states(verification.verify(release, key)) == ALL_GOOD


def test_without_a_key_it_says_that_the_signature_was_not_checked(release):
    assert states(verification.verify(release, None)) == ALL_GOOD | {"signature": "unchecked"}


def test_a_release_that_nobody_signed(tmp_path, key):
    write_release(tmp_path / "plain", "1.0.0", "one", beside=True)
    assert states(verification.verify(tmp_path / "plain", None)) == ALL_GOOD | {"signature": "absent"}
    with pytest.raises(ReleaseError, match=r"`toy@1\.0\.0` is not signed"):
        verification.verify(tmp_path / "plain", key)


def test_a_release_from_before_there_were_such_files(tmp_path):
    write_release(tmp_path / "old", "1.0.0", "one")
    found = verification.verify(tmp_path / "old", None)
    assert states(found) == {"files": "verified", "provenance": "absent", "SBOM": "absent", "signature": "absent"}


def test_equal_releases_have_equal_files(base, release, tmp_path):
    write_release(tmp_path / "again", "1.1.0", "two", key=base / "key")
    for name in attest.names(base / "key"):
        assert (tmp_path / "again" / name).read_bytes() == (release / name).read_bytes()


def change(release, name, data):
    (release / name).write_bytes(data)


def truncate(release, name):
    os.truncate(release / name, (release / name).stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: change(it, ENGINE, b"evil for any-echo"), "bytes"),
        (lambda it: change(it, ENGINE, b"owt for any-echo"), "sha256 differs"),
        (lambda it: truncate(it, ENGINE), "has 8 bytes, the manifest says 16"),
        (lambda it: (it / ENGINE).unlink(), "is missing"),
        (lambda it: (it / "golden.safetensors").unlink(), "is missing"),
        (lambda it: change(it, f"engines/{TARGETS[0]}/more.bin", b"x"), r"more\.bin` is not part of the release"),
        (lambda it: change(it, "run.sh", b"x"), r"`run\.sh` is not part of the release"),
        (lambda it: ((it / ENGINE).unlink(), (it / ENGINE).symlink_to("/etc/passwd")), "is missing"),
        (lambda it: truncate(it, "manifest.json"), "is not a release manifest"),
        (lambda it: (it / "manifest.json").unlink(), "holds no release"),
        (lambda it: truncate(it, "provenance.json"), r"`provenance\.json` is not in its form: Invalid JSON"),
        (lambda it: change(it, "provenance.json", b"[]"), r"`provenance\.json` is not in its form: Input should be"),
        (lambda it: (it / "provenance.json").unlink(), r"`provenance\.json` is missing"),
        (lambda it: change(it, "sbom.json", b"{}"), r"`sbom\.json` is not in its form: bomFormat: Field required"),
        (lambda it: (it / "sbom.json").unlink(), r"`sbom\.json` is missing"),
        (lambda it: truncate(it, "signature.json"), "no Sigstore bundle"),
        (lambda it: change(it, "signature.json", b"\xff"), "no Sigstore bundle"),
        (lambda it: (it / "signature.json").unlink(), r"`signature\.json` is missing"),
    ],
)
@pytest.mark.parametrize("with_key", [True, False])
def test_damage_is_refused(release, key, damage, message, with_key):
    damage(release)
    with pytest.raises(ReleaseError, match=message):
        verification.verify(release, key if with_key else None)


def rewrite(release, name, edit):
    """Change a JSON file."""
    content = json.loads((release / name).read_text())
    edit(content)
    (release / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("provenance.json", lambda it: it["subject"].pop(), "says nothing about"),
        ("provenance.json", lambda it: it["subject"].append({"name": "x", "digest": {"sha256": ""}}), "also about `x`"),
        ("provenance.json", lambda it: it["subject"][0]["digest"].update(sha256="0" * 64), "is not what"),
        ("provenance.json", lambda it: it["subject"].append(it["subject"][0]), "speaks twice about"),
        ("provenance.json", lambda it: it.update(predicateType="other"), "not in its form: predicateType"),
        (
            "provenance.json",
            lambda it: it["predicate"]["buildDefinition"]["externalParameters"].update(version="9.9.9"),
            "about another release",
        ),
        (
            "provenance.json",
            lambda it: it["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"].update(gitCommit="f"),
            "do not agree on `source`",
        ),
        ("sbom.json", lambda it: it["metadata"]["component"].update(version="9"), "about another release"),
        ("sbom.json", lambda it: it["components"].pop(), "says nothing about"),
        (
            "sbom.json",
            lambda it: it["components"].append({"type": "library", "name": "evil", "version": "1"}),
            "do not agree on the package `evil`",
        ),
    ],
)
def test_papers_of_something_else_are_refused(release, key, name, edit, message):
    rewrite(release, name, edit)
    with pytest.raises(ReleaseError, match=message):
        verification.verify(release, None)


def test_another_key(release, base):
    with pytest.raises(ReleaseError, match="does not fit the key"):
        verification.verify(release, base / "other.pub")


def test_a_release_that_was_made_again_by_somebody_else(base, key, tmp_path):
    write_release(tmp_path / "evil", "1.1.0", "evil", key=base / "other")
    assert states(verification.verify(tmp_path / "evil", None))["signature"] == "unchecked"
    with pytest.raises(ReleaseError, match="does not fit the key"):
        verification.verify(tmp_path / "evil", key)


@pytest.mark.parametrize("with_key", [True, False])
def test_the_signature_of_another_release(release, base, key, with_key):
    shutil.copy(base / "one" / "signature.json", release)
    with pytest.raises(ReleaseError, match=r"is not what `signature\.json` says"):
        verification.verify(release, key if with_key else None)


def test_one_file_of_another_release(release, base, key):
    """All that can be made to fit without the key was made to fit: manifest, provenance and SBOM."""
    old = manifest.parse((release / "manifest.json").read_text(), "x")
    write_release(release.parent / "evil", old.version, "evil", key=base / "other")
    shutil.copy(release / "signature.json", release.parent / "evil")
    with pytest.raises(ReleaseError, match=r"is not what `signature\.json` says"):
        verification.verify(release.parent / "evil", key)


def test_a_signature_that_was_taken_away(release, key):
    """The manifest no longer speaks of it, and provenance and SBOM fit that manifest."""
    plain = write_release(release.parent / "plain", "1.1.0", "two", beside=True)
    assert plain.beside == ("provenance.json", "sbom.json")
    with pytest.raises(ReleaseError, match="is not signed"):
        verification.verify(release.parent / "plain", key)


def test_an_older_release_in_the_place_of_a_newer_one(base, key):
    assert verification.verify(base / "one", key, "toy").manifest.version == "1.0.0"
    with pytest.raises(ReleaseError, match=r"holds `toy@1\.0\.0`, expected `toy@1\.1\.0`"):
        verification.verify(base / "one", key, "toy@1.1.0")
    with pytest.raises(ReleaseError, match=r"expected `other`"):
        verification.verify(base / "one", key, "other")


def test_a_statement_over_something_else_is_no_signature_over_files(release, base, key):
    said = {"_type": trust.STATEMENT, "predicateType": "urn:exportyard:channel:v1", "predicate": {"resources": []}}
    (release / "signature.json").write_text(trust.sign_bundle(said, base / "key"))
    with pytest.raises(ReleaseError, match=r"`signature\.json` is not in its form: predicateType"):
        verification.verify(release, key)


def test_the_command(release, key, monkeypatch, capsys):
    monkeypatch.delenv(trust.PUBLIC_KEY, raising=False)
    assert cli.invoke(["verify", str(release), "--key", str(key)]) == 0
    assert "every file is signed" in capsys.readouterr().out
    monkeypatch.setenv(trust.PUBLIC_KEY, str(key))
    assert cli.invoke(["verify", str(release), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {check["what"]: check["state"] for check in told["checks"]} == ALL_GOOD
    truncate(release, ENGINE)
    assert cli.invoke(["verify", str(release)]) == 12
    assert "has 8 bytes" in capsys.readouterr().err


def test_the_private_key_is_in_none_of_the_files(release, base):
    secret = (base / "key").read_text().splitlines()[1]
    assert not [path for path in release.rglob("*") if path.is_file() and secret in path.read_text()]


def test_provenance_says_what_was_built_from_what(release):
    said = json.loads((release / "provenance.json").read_text())["predicate"]
    assert said["buildDefinition"]["externalParameters"] == {
        "recipe": "toy",
        "version": "1.1.0",
        "targets": sorted(TARGETS),
    }
    assert said["buildDefinition"]["resolvedDependencies"][0] == {
        "name": "source",
        "digest": {"gitCommit": COMMIT},
        "uri": "git+https://example.com/toys",
    }


@pytest.mark.parametrize(
    ("origin", "uri"),
    [
        (None, None),
        ("/srv/git/toys.git", None),
        ("../toys", None),
        ("file:///srv/git/toys.git", None),
        ("https://me:secret@example.com:8443/toys.git", "git+https://example.com:8443/toys.git"),
        ("git@example.com:me/toys.git", "git+ssh://example.com/me/toys.git"),
        ("ssh://git@example.com/me/toys.git", "git+ssh://example.com/me/toys.git"),
        ("https://example.com/toys?token=secret", "git+https://example.com/toys"),
    ],
)
def test_addresses_of_repositories(origin, uri):
    assert attest.public_uri(origin) == uri


def test_openssf_model_signing_agrees(release, base, key):
    """It verifies what we sign, and we verify what it signs."""
    pytest.importorskip("model_signing", reason="needs the extra `trust`")
    (release / "artifact.json").write_text("{}")
    signature = str(release / "signature.json")
    tool = [sys.executable, "-W", "ignore", "-m", "model_signing"]
    releases = [str(release), "--signature", signature]
    for command in (
        [*tool, "verify", "key", *releases, "--public_key", str(key)],
        [
            *tool,
            "sign",
            "key",
            *releases,
            "--private_key",
            str(base / "key"),
            "--ignore-paths",
            f"{release}/artifact.json",
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "signature.json" in (release / "manifest.json").read_text()
    assert (release / "signature.json").read_bytes() != (base / "two" / "signature.json").read_bytes()
    assert states(verification.verify(release, key)) == ALL_GOOD


def test_the_papers_keep_to_their_schemas(release):
    reason = "needs the extra `trust`"
    validation = pytest.importorskip("cyclonedx.validation.json", reason=reason)
    schema = pytest.importorskip("cyclonedx.schema", reason=reason).SchemaVersion.V1_6
    found = validation.JsonStrictValidator(schema).validate_str((release / "sbom.json").read_text())
    assert found is None, found
    slsa = pytest.importorskip("in_toto_attestation.predicates.provenance.v1.provenance_pb2", reason=reason)
    statements = pytest.importorskip("in_toto_attestation.v1.statement", reason=reason)
    json_format = pytest.importorskip("google.protobuf.json_format", reason=reason)
    said = json.loads((release / "provenance.json").read_text())
    json_format.ParseDict(said["predicate"], slsa.Provenance())  # refuses a field that it doesn't know
    statement = json_format.ParseDict(said, statements.Statement([], "", {}).pb)
    statements.Statement.copy_from_pb(statement).validate()


def nodes(content, path=()):
    """Where everything is in a JSON value."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from nodes(value, (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


JUNK = (None, 0, "", "x", [], {}, ["x"], {"x": 1}, [[]], [{}], True)


@pytest.mark.parametrize("name", ["provenance.json", "sbom.json", "signature.json"])
def test_nonsense_anywhere_in_the_papers_ends_in_a_message(release, base, name):
    """Only what says nothing about the release may be changed, and never with a key."""
    known = (release / name).read_text()
    content = json.loads(known)
    if name == "signature.json":
        content = json.loads(base64.b64decode(content["dsseEnvelope"]["payload"]))
    found = manifest.load(release)
    for path in nodes(content):
        for junk in JUNK:
            text = json.dumps(replaced(content, path, junk))
            if name == "signature.json":
                bundle = json.loads(known)
                bundle["dsseEnvelope"]["payload"] = base64.b64encode(text.encode()).decode()
                text = json.dumps(bundle)
            (release / name).write_text(text)
            with contextlib.suppress(ReleaseError):
                verification.papers(release, found, None)
    with pytest.raises(ReleaseError):
        verification.papers(release, found, base / "key.pub")


def test_random_damage_is_always_noticed(release, base):
    """A changed, missing or longer file, whichever and wherever; the signature may only be written in another way."""
    random = Random(0)
    files = sorted(path for path in release.rglob("*") if path.is_file())
    for _ in range(300):
        path = random.choice(files)
        data = path.read_bytes()
        place = random.randrange(len(data))
        damaged = random.choice(
            [
                data[:place],
                data + data[place:] or b"x",
                data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :],
                data[:place] + random.choice(files).read_bytes()[:9] + data[place + 9 :],
            ]
        )
        if damaged == data:
            continue
        path.write_bytes(damaged)
        try:
            found = verification.verify(release, base / "key.pub")
        except ReleaseError:
            pass
        else:
            assert path.name == "signature.json", path
            assert states(found) == ALL_GOOD
        path.write_bytes(data)
    assert states(verification.verify(release, base / "key.pub")) == ALL_GOOD
