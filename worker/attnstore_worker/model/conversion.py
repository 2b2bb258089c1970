"""GGUF files converted once into a Hugging Face folder, because reading a GGUF file takes 18 s and reading the folder 0.4 s.

Owns: the converted models in the cache folder (`file_digests.cache_dir`).
Invariant: a folder under its final name is complete: it is written under another name and renamed, so processes may race.
"""

from __future__ import annotations

import importlib
import io
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import save_file

from attnstore.environment import variable_name
from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.file_digests import cache_dir
from attnstore_worker.model.checkpoint import read_module
from attnstore_worker.model_source import FolderSource, GgufSource, find_model, weights_digest

_GGUF_PACKAGES: Final = ("accelerate", "gguf")
"""Imported by transformers, whose error for a missing package looks like that for a damaged file."""


def converted_model(source: GgufSource, digest: bytes, cache: Path) -> FolderSource:
    """Returns the model of a GGUF file as a folder of fp32 safetensors, from the cache or converted now (20 s, 5 times the size).

    `digest` is `weights_digest(source)`. Raises `ModelUnavailable` for a damaged file, or if the cache cannot be written.
    """
    # transformers converts, so another version of it may give other bytes.
    folder = cache / "models" / f"{source.name}-{digest.hex()[:16]}-transformers-{transformers.__version__}"
    if (folder / "config.json").is_file():
        return FolderSource(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
            # Renamed from within the scratch folder, which itself stays and is removed.
            unfinished = Path(scratch) / "model"
            unfinished.mkdir()
            _convert(source, unfinished)
            _publish(unfinished, folder)
    except OSError as error:
        raise ModelUnavailable(
            f"the model converted from {source.path} cannot be kept in {folder.parent}: {error}; "
            f"set {variable_name('cache_dir')} to a folder that can be written"
        ) from error
    return FolderSource(folder)


def model_folder(path: Path | None, cache: Path | None = None) -> FolderSource:
    """Returns the model at `path` (see `find_model`) as a Hugging Face folder: itself, or the converted one in `cache`.

    Raises `ModelUnavailable`.
    """
    source = find_model(path)
    if not isinstance(source, GgufSource):
        return source
    cache = cache or cache_dir()
    return converted_model(source, weights_digest(source, cache), cache)


def export_model(path: Path | None, folder: Path, cache: Path | None = None) -> None:
    """Writes the model at `path` (see `find_model`) as a Hugging Face folder of fp32 safetensors that other programs load.

    Raises `ModelUnavailable` for a damaged model, for one that is already such a folder, or if `folder` cannot be created.
    """
    source = find_model(path)
    if not isinstance(source, GgufSource):
        raise ModelUnavailable(f"{source.path} is a Hugging Face folder already; only a .gguf file is converted")
    cache = cache or cache_dir()
    converted = converted_model(source, weights_digest(source, cache), cache)
    try:
        shutil.copytree(converted.path, folder)
    except (OSError, shutil.Error) as error:
        raise ModelUnavailable(f"the model cannot be written to {folder}: {error}") from error


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
        shutil.rmtree(unfinished)  # another process was first, with the same bytes


def _convert(source: GgufSource, folder: Path) -> None:
    model, tokenizer = _read_gguf(source)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    # The saved weights are dequantised; transformers would refuse to load a config that says otherwise.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.config.save_pretrained(folder)


def _read_gguf(source: GgufSource) -> tuple[Any, Any]:
    for package in _GGUF_PACKAGES:
        importlib.import_module(package)
    # Its progress bar can be silenced only through its output stream.
    bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    try:
        with bar:
            model = read_module(source.path.parent, gguf_file=source.path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
    except (ImportError, ModelUnavailable):
        raise
    except Exception as error:  # the reader of a damaged file fails in as many ways as there are fields
        raise ModelUnavailable(
            f"{source.path} is not a complete GGUF model ({type(error).__name__}: {error}); if truncated, install it again"
        ) from error
    return model, tokenizer
