"""``sbom.json``: what a release consists of and which packages made it, as CycloneDX 1.6 has it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from pipeline import manifest
from pipeline.manifest import Engine, Manifest, ReleaseFile

# what `tools` of a manifest also has, and that is no package
HOST_FACTS = frozenset({"cpu", "gpu", "code", "compiler", "linker"})
_OURS = "exportyard"


def of(made: Manifest, whole: str) -> dict[str, Any]:
    """The bill of materials of a release: its engines and files with digests, and the packages behind them.

    It has no time, and its serial number comes from the manifest, so that equal releases give equal bytes.

    Args:
        whole: sha256 of the manifest's file.
    """
    release = f"{made.recipe}@{made.version}"
    engines = sorted(made.engines.items())
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{release}#{whole}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": _OURS, "version": made.tools.get(_OURS, "?")}]},
            "component": {
                "type": "machine-learning-model",
                "bom-ref": release,
                "name": made.recipe,
                "version": made.version,
                "hashes": _hashes(whole),
            },
        },
        "components": [
            *(_engine(name, engine) for name, engine in engines),
            {"type": "data", "bom-ref": made.golden.file.path, **_file(made.golden.file)},
            *(_library(name, version) for name, version in packages(made)),
        ],
        "dependencies": [
            {"ref": release, "dependsOn": sorted([*(_ref(name) for name, _ in engines), made.golden.file.path])},
            *(
                {"ref": _ref(name), "dependsOn": [_purl(*one) for one in sorted({*_of_engine(engine)})]}
                for name, engine in engines
            ),
        ],
    }


def packages(made: Manifest) -> list[tuple[str, str]]:
    """Name and version of each package that decided any bytes of a release; two engines may have had two versions."""
    return sorted({*_packages(made.tools), *(one for engine in made.engines.values() for one in _of_engine(engine))})


def _ref(target: str) -> str:
    return manifest.folder_of(target).rstrip("/")


def _packages(tools: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, version) for name, version in tools.items() if name not in {*HOST_FACTS, _OURS}]


def _of_engine(engine: Engine) -> list[tuple[str, str]]:
    return _packages(engine.tools)


def _engine(target: str, engine: Engine) -> dict[str, Any]:
    metric = engine.parity.metric
    return {
        "type": "machine-learning-model",
        "bom-ref": _ref(target),
        "name": target,
        "description": f"{engine.target.backend} engine in {engine.scheme} for {engine.target.platform}",
        "components": [{"type": "file", **_file(file)} for file in engine.files],
        "modelCard": {
            "quantitativeAnalysis": {
                "performanceMetrics": [{"type": metric.name, "value": str(metric.engine), "slice": "evaluation"}]
            }
        },
        "properties": [
            {"name": f"exportyard:{name}", "value": version}
            for name, version in sorted(engine.tools.items())
            if name in HOST_FACTS
        ],
    }


def _file(file: ReleaseFile) -> dict[str, Any]:
    return {"name": file.path, "hashes": _hashes(file.sha256)}


def _library(name: str, version: str) -> dict[str, Any]:
    purl = _purl(name, version)
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]
