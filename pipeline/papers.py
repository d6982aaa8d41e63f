"""What lies beside a manifest, read: what can be compared with the release, in files that may come from anybody."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Paper(BaseModel):
    """A part of such a file; keys that say nothing to us are left to others."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Named(Paper):
    """Something with digests, by algorithm."""

    name: str
    digest: dict[str, str]


class Parameters(Paper):
    """What a release was asked to be."""

    recipe: str
    version: str


class BuildDefinition(Paper):
    """SLSA: what was asked for, and what went in."""

    parameters: Parameters = Field(alias="externalParameters")
    dependencies: list[Named] = Field(alias="resolvedDependencies")


class Build(Paper):
    """SLSA's predicate."""

    definition: BuildDefinition = Field(alias="buildDefinition")


class Provenance(Paper):
    """``provenance.json``."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: Literal["https://slsa.dev/provenance/v1"] = Field(alias="predicateType")
    subject: list[Named]
    predicate: Build


class Hash(Paper):
    """CycloneDX: a digest."""

    alg: str
    content: str


class Component(Paper):
    """CycloneDX: a model, file, data set or package, and what it consists of."""

    type: str
    name: str
    version: str | None = None
    hashes: list[Hash] = []
    components: list[Component] = []

    def files(self) -> list[tuple[str, str]]:
        """Name and sha256 of this and of all inside, as far as they have one."""
        own = [(self.name, one.content) for one in self.hashes if one.alg == "SHA-256"]
        return own + [pair for one in self.components for pair in one.files()]


class Metadata(Paper):
    """CycloneDX: what a bill of materials is about."""

    component: Component


class Sbom(Paper):
    """``sbom.json``."""

    bom_format: Literal["CycloneDX"] = Field(alias="bomFormat")
    metadata: Metadata
    components: list[Component]


class Resource(Paper):
    """model-signing: a file that was signed."""

    name: str
    algorithm: Literal["sha256"]
    digest: str


class Resources(Paper):
    """model-signing's predicate."""

    resources: list[Resource]


class Signed(Paper):
    """What a signature is over: the statement inside ``signature.json``."""

    predicate_type: Literal["https://model_signing/signature/v1.0"] = Field(alias="predicateType")
    predicate: Resources
