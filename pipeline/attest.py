"""What lies beside the manifest of a release: where it comes from, what it consists of, and who vouches for it.

All three files are made from the manifest alone, so that equal releases have equal ones. They need no network.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pipeline import digest, manifest, sbom, store, trust
from pipeline.manifest import PROVENANCE, SBOM, SIGNATURE, Beside, Manifest

BUILD_TYPE = "urn:exportyard:publish:v1"
BUILDER = "urn:exportyard:builder:v1"
SLSA = "https://slsa.dev/provenance/v1"
MODEL_SIGNATURE = "https://model_signing/signature/v1.0"
_DATA = "canonical JSON of the sha256 of each file"


def names(key: Path | None) -> tuple[Beside, ...]:
    """Which files there are beside a manifest; the signature only with a key."""
    return (PROVENANCE, SBOM, SIGNATURE) if key is not None else (PROVENANCE, SBOM)


def write(folder: Path, source: str | None, key: Path | None, tools: Iterable[tuple[str, str]] = ()) -> None:
    """Add provenance, SBOM and, with `key`, the signature to the release in `folder`.

    Args:
        folder: a whole release; its manifest's `beside` is what `names` says.
        source: address of the git repository, of `public_uri`.
        key: private key, PEM.
        tools: name and version of tools that took part, beside those that the manifest knows.

    Raises:
        ReleaseError: `folder` holds no manifest, or `key` can't be used.
    """
    path = folder / manifest.FILE
    made = manifest.parse(path.read_text(), str(path))
    whole = digest.of_file(path)
    store.write_json(folder / PROVENANCE, provenance(made, whole, source, tools))
    store.write_json(folder / SBOM, sbom.of(made, whole))
    if key is not None:
        known = {file.path: file.sha256 for file in made.files()} | {manifest.FILE: whole}
        known |= {name: digest.of_file(folder / name) for name in (PROVENANCE, SBOM)}
        said = signed_statement(f"{made.recipe}@v{made.version}", known)
        (folder / SIGNATURE).write_text(trust.sign_bundle(said, key))


def provenance(made: Manifest, whole: str, source: str | None, tools: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """An in-toto statement with SLSA's provenance: what was built from what, by which tools.

    Args:
        whole: sha256 of the manifest's file.
        source, tools: as for `write`.
    """
    files = {file.path: file.sha256 for file in made.files()} | {manifest.FILE: whole}
    return {
        "_type": trust.STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": files[name]}} for name in sorted(files)],
        "predicateType": SLSA,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": made.recipe,
                    "version": made.version,
                    "targets": sorted(made.engines),
                },
                "internalParameters": {"uncommittedChanges": made.source.dirty},
                "resolvedDependencies": dependencies(made, source),
            },
            "runDetails": {"builder": {"id": BUILDER, "version": _tools(made, tools)}, "metadata": {}},
        },
    }


def dependencies(made: Manifest, source: str | None) -> list[dict[str, Any]]:
    """What a release was made from, as SLSA's resource descriptors: code, checkpoint and data."""
    code: dict[str, Any] = {"name": "source", "digest": {"gitCommit": made.source.commit}}
    return [
        code if source is None else code | {"uri": source},
        *(
            {"name": f"checkpoint/{name}", "digest": {"sha256": made.checkpoint[name]}}
            for name in sorted(made.checkpoint)
        ),
        {"name": "data", "digest": {"sha256": made.data}, "annotations": {"sha256-of": _DATA}},
    ]


def _tools(made: Manifest, others: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Every tool with its version; two targets may have been built with different ones."""
    found: dict[str, set[str]] = {}
    of_engines = (pair for engine in made.engines.values() for pair in engine.tools.items())
    for name, version in (*made.tools.items(), *of_engines, *others):
        if name not in sbom.HOST_FACTS:
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def public_uri(origin: str | None) -> str | None:
    """A repository's address in SLSA's form; never with a password, and None for a folder of one machine."""
    if origin is None:
        return None
    short = re.fullmatch(r"(?:[^@/:]+@)?([^@/:]+):(?!//)(.+)", origin)  # git@host:path
    if short is not None:
        return f"git+ssh://{short[1]}/{short[2].lstrip('/')}"
    parts = urlsplit(origin)
    if parts.scheme not in ("https", "http", "ssh", "git") or not parts.hostname:
        return None
    port = f":{parts.port}" if parts.port else ""
    return f"git+{parts.scheme}://{parts.hostname}{port}{parts.path}"


def signed_statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """What OpenSSF's model-signing says about a folder: a statement that lists the sha256 of every file in it.

    Args:
        name: of the release.
        files: sha256 by path.
    """
    ordered = sorted(files, key=PurePosixPath)
    root = hashlib.sha256(b"".join(bytes.fromhex(files[path]) for path in ordered))
    return {
        "_type": trust.STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root.hexdigest()}}],
        "predicateType": MODEL_SIGNATURE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [store.MANIFEST, SIGNATURE],
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in ordered],
        },
    }
