"""Keys and signatures: ECDSA on P-256 with SHA-256, over DSSE envelopes. Works offline; no key is ever printed.

A signature is made without random numbers (RFC 6979), so that equal statements give equal bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import digest
from pipeline.errors import ReleaseError

if TYPE_CHECKING:  # takes 60 ms, and most commands sign nothing
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

SIGNING_KEY = "EXPORTYARD_SIGNING_KEY"
PUBLIC_KEY = "EXPORTYARD_KEY"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_MAKE_ONE = "`exportyard keygen FILE` makes a pair: FILE to sign with, FILE.pub for those who verify"


def keygen(file: Path) -> Path:
    """Make a key pair: the private key in `file`, which only its owner may read, and the public one beside it.

    Returns:
        The public key's file: `file` with ``.pub`` behind its name.

    Raises:
        ReleaseError: one of the files is there already.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = file.with_name(file.name + ".pub")
    for path in (file, public):
        if path.exists() or path.is_symlink():
            raise ReleaseError(f"`{path}` is there already", hint="a lost key can't be made again: choose another name")
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_new(file, private, 0o600)
    _write_new(public, _pem(key.public_key()), 0o644)
    return public


def _write_new(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(data)


def signing_key() -> Path | None:
    """The private key that `EXPORTYARD_SIGNING_KEY` names; None where nothing is signed."""
    text = os.environ.get(SIGNING_KEY)
    return Path(text) if text else None


def public_key(given: Path | None) -> Path | None:
    """The key to verify with: `given`, else what `EXPORTYARD_KEY` names; None where nobody has said one."""
    text = os.environ.get(PUBLIC_KEY)
    return given if given is not None else Path(text) if text else None


def sign_statement(statement: Mapping[str, Any], key: Path) -> bytes:
    """A DSSE envelope, as JSON, over an in-toto statement. Equal statements and keys give equal bytes.

    Args:
        key: private key, PEM.

    Raises:
        ReleaseError: `key` can't be read, or is no private key on P-256.
    """
    private = _private(key)
    return digest.canonical(_envelope(statement, private, key_id(private.public_key()))).encode()


def read_statement(envelope: bytes, key: Path, where: str) -> dict[str, Any]:
    """The statement in a DSSE envelope, after its signature was verified.

    Args:
        key: public key, PEM.
        where: what the envelope was read from, for messages.

    Raises:
        ReleaseError: it isn't such an envelope, or `key` did not sign it.
    """
    try:
        found = json.loads(envelope)
    except (ValueError, RecursionError):
        raise _unreadable(where, "it is not JSON") from None
    return _opened(found, _public(key), where)


def sign_bundle(statement: Mapping[str, Any], key: Path) -> str:
    """A Sigstore bundle, as OpenSSF's model-signing writes it with a local key, over an in-toto statement.

    Raises:
        ReleaseError: as `sign_statement`.
    """
    private = _private(key)
    material = {"publicKey": {"hint": key_id(private.public_key())}, "tlogEntries": []}
    bundle = {"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": _envelope(statement, private, "")}
    return digest.canonical(bundle) + "\n"


def read_bundle(text: str, key: Path | None, where: str) -> dict[str, Any]:
    """The statement in a Sigstore bundle. Without `key` it is only read, and may come from anybody.

    Raises:
        ReleaseError: it is no such bundle, or `key` did not sign it.
    """
    try:
        bundle = json.loads(text)
        kind, envelope = bundle["mediaType"], bundle["dsseEnvelope"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _unreadable(where, f"it is no Sigstore bundle ({type(error).__name__})") from None
    if kind != BUNDLE:
        raise _unreadable(where, f"expected `{BUNDLE}`")
    return _opened(envelope, None if key is None else _public(key), where)


def signer(key: Path) -> str:
    """The identity of a private key: that of its public one.

    Raises:
        ReleaseError: as `sign_statement`.
    """
    return key_id(_private(key).public_key())


def _envelope(statement: Mapping[str, Any], private: EllipticCurvePrivateKey, keyid: str) -> dict[str, Any]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = digest.canonical(statement).encode()
    signature = private.sign(_pae(payload), ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD,
        "signatures": [{"keyid": keyid, "sig": base64.b64encode(signature).decode()}],
    }


def _opened(envelope: Any, public: EllipticCurvePublicKey | None, where: str) -> dict[str, Any]:
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind, signatures = envelope["payloadType"], envelope["signatures"]
        signature = base64.b64decode(signatures[0]["sig"], validate=True)
    except (KeyError, TypeError, IndexError, binascii.Error, ValueError) as error:
        raise _unreadable(where, f"it is no DSSE envelope ({type(error).__name__})") from None
    if kind != PAYLOAD or len(signatures) != 1:
        raise _unreadable(where, f"expected one signature over `{PAYLOAD}`")
    if public is not None:
        _check(public, signature, payload, where)
    try:
        statement = json.loads(payload)
    except (ValueError, RecursionError):
        statement = None
    if not isinstance(statement, dict) or statement.get("_type") != STATEMENT:
        raise _unreadable(where, "it holds no in-toto statement")
    return statement


def _check(public: EllipticCurvePublicKey, signature: bytes, payload: bytes, where: str) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        public.verify(signature, _pae(payload), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise ReleaseError(
            f"the signature in {where} does not fit the key: another key made it, or the content was changed",
            hint="get the release again, and see that the public key is that of who published it",
        ) from None


def _pae(payload: bytes) -> bytes:
    """What DSSE signs: the payload with its type, and the lengths of both."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _unreadable(where: str, why: str) -> ReleaseError:
    return ReleaseError(f"the signature in {where} can't be read: {why}", hint="get the release again")


def key_id(public: EllipticCurvePublicKey) -> str:
    """sha256 of the public key's PEM text, which Sigstore's bundles call its hint."""
    return hashlib.sha256(_pem(public)).hexdigest()


def _pem(public: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _private(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:  # TypeError: it has a passphrase
        why = "it has a passphrase" if isinstance(error, TypeError) else "it is no private key in PEM"
        raise ReleaseError(f"can't sign with `{path}`: {why}", hint=_MAKE_ONE) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise ReleaseError(f"can't sign with `{path}`: it is not a key on the curve P-256", hint=_MAKE_ONE)
    return key


def _public(path: Path) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    text = _read(path)
    try:
        key = serialization.load_pem_public_key(text)
    except ValueError:
        if b"PRIVATE KEY" in text:
            raise ReleaseError(f"`{path}` is a private key, which only signs", hint=f"`{path}.pub` verifies") from None
        raise ReleaseError(f"can't verify with `{path}`: it is no public key in PEM", hint=_MAKE_ONE) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ReleaseError(f"can't verify with `{path}`: it is not a key on the curve P-256", hint=_MAKE_ONE)
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReleaseError(f"can't read the key `{path}`: {error.strerror or error}", hint=_MAKE_ONE) from None
