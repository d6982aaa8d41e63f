"""Keys and statements: what a key signs is what the other key opens, and nothing else."""

import base64
import json
import stat
import subprocess

import pytest

from pipeline import trust
from pipeline.errors import ReleaseError

SAID = {"_type": trust.STATEMENT, "subject": [{"name": "toy", "digest": {"sha256": "0" * 64}}], "predicate": {"a": 1}}


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "key"
    trust.keygen(file)
    return file


def public(key):
    return key.with_name("key.pub")


def test_a_pair_of_keys(key, tmp_path):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert public(key).read_text().startswith("-----BEGIN PUBLIC KEY-----\n")
    said = subprocess.run(["openssl", "pkey", "-in", str(key), "-pubout"], capture_output=True, check=True).stdout
    assert said == public(key).read_bytes()


def test_no_key_is_replaced(key, tmp_path):
    with pytest.raises(ReleaseError, match=r"key.* is there already"):
        trust.keygen(key)
    (tmp_path / "new.pub").write_text("mine")
    with pytest.raises(ReleaseError, match=r"new\.pub.* is there already"):
        trust.keygen(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new.pub"]


def test_a_statement_comes_back(key):
    envelope = trust.sign_statement(SAID, key)
    assert trust.read_statement(envelope, public(key), "a test") == SAID
    assert trust.sign_statement(dict(reversed(SAID.items())), key) == envelope, "equal statements, equal bytes"


def test_another_key_opens_nothing(key, tmp_path):
    other = trust.keygen(tmp_path / "other")
    with pytest.raises(ReleaseError, match="the signature in `x` does not fit the key"):
        trust.read_statement(trust.sign_statement(SAID, key), other, "`x`")


def test_a_changed_statement_is_refused(key):
    envelope = json.loads(trust.sign_statement(SAID, key))
    envelope["payload"] = base64.b64encode(json.dumps(SAID | {"predicate": {"a": 2}}).encode()).decode()
    with pytest.raises(ReleaseError, match="does not fit the key"):
        trust.read_statement(json.dumps(envelope).encode(), public(key), "a test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload": "?"}, "no DSSE envelope"),
        ({"payloadType": "text/plain"}, "expected one signature over"),
        ({"signatures": []}, "no DSSE envelope"),
        ({"signatures": [{"sig": ""}, {"sig": ""}]}, "expected one signature over"),
        ({"signatures": [{"sig": "AAAA"}]}, "does not fit the key"),
    ],
)
def test_a_broken_envelope_is_refused(key, change, message):
    envelope = json.loads(trust.sign_statement(SAID, key)) | change
    with pytest.raises(ReleaseError, match=message):
        trust.read_statement(json.dumps(envelope).encode(), public(key), "a test")


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"[" * 100_000])
def test_what_is_no_envelope_is_refused(key, text):
    with pytest.raises(ReleaseError, match="the signature in a test can't be read"):
        trust.read_statement(text, public(key), "a test")


def test_signed_but_no_statement(key):
    with pytest.raises(ReleaseError, match="no in-toto statement"):
        trust.read_statement(trust.sign_statement({"a": 1}, key), public(key), "a test")


def test_files_that_are_no_keys(key, tmp_path):
    with pytest.raises(ReleaseError, match="can't read the key"):
        trust.sign_statement(SAID, tmp_path / "none")
    with pytest.raises(ReleaseError, match="no private key in PEM"):
        trust.sign_statement(SAID, public(key))
    with pytest.raises(ReleaseError, match=r"key` is a private key"):
        trust.read_statement(trust.sign_statement(SAID, key), key, "a test")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(ReleaseError, match="no public key in PEM"):
        trust.read_statement(trust.sign_statement(SAID, key), tmp_path / "text", "a test")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["genpkey", "-algorithm", "ed25519"], "not a key on the curve P-256"),
        (["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], "not a key on the curve P-256"),
        (
            ["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-aes128", "-pass", "pass:x"],
            "it has a passphrase",
        ),
    ],
)
def test_keys_of_other_kinds(tmp_path, command, message):
    file = tmp_path / "key"
    subprocess.run(["openssl", *command, "-out", str(file)], capture_output=True, check=True)
    with pytest.raises(ReleaseError, match=message):
        trust.sign_statement(SAID, file)


def test_where_the_keys_are(monkeypatch, tmp_path):
    for name in (trust.SIGNING_KEY, trust.PUBLIC_KEY):
        monkeypatch.delenv(name, raising=False)
    assert trust.signing_key() is None
    assert trust.public_key(None) is None
    monkeypatch.setenv(trust.SIGNING_KEY, "/a/key")
    monkeypatch.setenv(trust.PUBLIC_KEY, "/a/key.pub")
    assert str(trust.signing_key()) == "/a/key"
    assert str(trust.public_key(None)) == "/a/key.pub"
    assert trust.public_key(tmp_path) == tmp_path
