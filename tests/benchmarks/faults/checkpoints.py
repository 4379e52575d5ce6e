"""Rows 12 to 17: checkpoints that are damaged or mixed up between two attempts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from launcher.runs.checkpoints import Manifest
from launcher.runs.layout import RunDirectory
from tests.benchmarks.faults.material import EVERY
from tests.benchmarks.faults.registry import ALL, ENGINES, ONE, Expected, injection
from tests.benchmarks.faults.scene import Scene

NEWEST, BEFORE = 20, 20 - EVERY
Damage = Callable[[Scene, Path], None]


def shard_of(directory: Path) -> Path:
    """The largest file of a checkpoint."""
    return max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)


def change(path: Path, at: int, content: bytes) -> None:
    """Other bytes in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


def _truncated(scene: Scene, directory: Path) -> None:
    shard = shard_of(directory)
    os.truncate(shard, shard.stat().st_size - 1000)


def _metadata_missing(scene: Scene, directory: Path) -> None:
    (directory / ".metadata").unlink()


def _metadata_half(scene: Scene, directory: Path) -> None:
    os.truncate(directory / ".metadata", (directory / ".metadata").stat().st_size // 2)


def _manifest_missing(scene: Scene, directory: Path) -> None:
    (directory / "manifest.json").unlink()


def _manifest_half(scene: Scene, directory: Path) -> None:
    os.truncate(directory / "manifest.json", (directory / "manifest.json").stat().st_size // 2)


def _bit(scene: Scene, directory: Path) -> None:
    shard = shard_of(directory)
    at = shard.stat().st_size // 2
    change(shard, at, bytes([shard.read_bytes()[at] ^ 1]))


def _page(scene: Scene, directory: Path) -> None:
    change(shard_of(directory), 8192, bytes(4096))


def _old_metadata(scene: Scene, directory: Path) -> None:
    for name in (".metadata", "manifest.json"):
        shutil.copy(scene.run.checkpoint(BEFORE) / name, directory / name)


def _old_metadata_renamed(scene: Scene, directory: Path) -> None:
    """The worst of it: what names the step is made to fit."""
    _old_metadata(scene, directory)
    manifest = Manifest.parse((directory / "manifest.json").read_text())
    changed = manifest.model_copy(update={"step": NEWEST})
    (directory / "manifest.json").write_text(changed.to_json())


def _shard_of_another_step(scene: Scene, directory: Path) -> None:
    shard = shard_of(directory)
    shutil.copy(scene.run.checkpoint(BEFORE) / shard.name, shard)


def _shard_of_another_run(scene: Scene, directory: Path) -> None:
    shard = shard_of(directory)
    shutil.copy(scene.material.undisturbed(scene.variant).checkpoint(40) / shard.name, shard)


def _of_another_run(scene: Scene, directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(
        RunDirectory(scene.material.undisturbed(scene.variant).path).checkpoint(40), scene.run.checkpoint(40)
    )


def _surplus(scene: Scene, directory: Path) -> None:
    (directory / "__9_0.distcp").write_bytes(b"x")


def _link(scene: Scene, directory: Path) -> None:
    shard = shard_of(directory)
    shard.rename(scene.folder / shard.name)
    shard.symlink_to(scene.folder / shard.name)


def _empty_extra(scene: Scene, directory: Path) -> None:
    manifest = Manifest.parse((directory / "manifest.json").read_text())
    progress = manifest.progress.model_copy(update={"extra": {}})
    (directory / "manifest.json").write_text(manifest.model_copy(update={"progress": progress}).to_json())


_DAMAGES: tuple[tuple[str, str, Damage, tuple[str, ...]], ...] = (
    ("12", "a shard truncated", _truncated, ALL),
    ("13", ".metadata missing", _metadata_missing, ENGINES),
    ("13", ".metadata half written", _metadata_half, ONE),
    ("13", "manifest.json missing", _manifest_missing, ENGINES),
    ("13", "manifest.json half written", _manifest_half, ONE),
    ("14", "one bit flipped in a shard", _bit, ALL),
    ("15", "a page zeroed in a shard", _page, ENGINES),
    ("16", "old .metadata and manifest over new shards", _old_metadata, ENGINES),
    ("16", "the same, its step made to fit", _old_metadata_renamed, ONE),
    ("17", "a shard of another step copied in", _shard_of_another_step, ENGINES),
    ("17", "a shard of another run copied in", _shard_of_another_run, ENGINES),
    ("17", "a checkpoint of another run copied in", _of_another_run, ENGINES),
    ("-", "a surplus file in a checkpoint", _surplus, ONE),
    ("-", "a shard that is a link", _link, ONE),
)


def _add(row: str, fault: str, damage: Damage, variants: tuple[str, ...]) -> None:
    @injection(
        row, f"{fault}, then resumed", Expected(seconds=120), variants, name=f"checkpoint{damage.__name__}"
    )
    def damaged(scene: Scene) -> None:
        scene.copy_stopped()
        damage(scene, scene.run.checkpoint(NEWEST))
        scene.start_again()
        scene.hit()
        scene.wait_end(120)
        resumed = [record["checkpoint"] for record in scene.events("resumed")]
        scene.check(f"it goes on from step {BEFORE}", resumed[-1:] == [f"step-{BEFORE:08d}"])
        scene.check(
            "the reason is written down",
            scene.events("rejected") or not (scene.run.checkpoint(NEWEST) / "manifest.json").exists(),
        )


for _damage in _DAMAGES:
    _add(*_damage)


@injection(
    "12-17",
    "every checkpoint damaged",
    Expected((6,), "checkpoint", ("step-00000010", "step-00000020"), 60, resumes=False),
    ENGINES,
)
def all_damaged(scene: Scene) -> None:
    scene.copy_stopped()
    for directory in scene.run.checkpoints.glob("step-*"):
        _bit(scene, directory)
    scene.start_again()
    scene.hit()


@injection(
    "S12",
    "a manifest that is valid, with an empty `extra`",
    Expected((6, 0), None, (), 60, resumes=False),
    ONE,
)
def empty_extra(scene: Scene) -> None:
    scene.copy_stopped()
    _empty_extra(scene, scene.run.checkpoint(NEWEST))
    scene.start_again()
    scene.hit()
    scene.wait_end(90)
    scene.check(
        "it is no error of launcher's own",
        "internal" not in scene.output() and "KeyError" not in scene.output(),
    )


@injection("S12", "manifest.json is a FIFO", Expected(codes=None, seconds=120), ONE)
def manifest_fifo(scene: Scene) -> None:
    scene.copy_stopped()
    manifest = scene.run.checkpoint(NEWEST) / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    for command in ("list", "verify"):
        done = scene.ask("checkpoint", command, str(scene.run.path), seconds=20)
        scene.check(f"`checkpoint {command}` does not hang", done.returncode != 124)
    scene.start_again()
    scene.hit()
    scene.wait_end(60)
    scene.check("`resume` does not hang", not scene.running())
    scene.give_up()
    manifest.unlink(missing_ok=True)  # the run that went on may have saved that step anew


@injection(
    "S12", "a .metadata that sets attributes of classes (BUILD)", Expected(codes=None, resumes=False), ONE
)
def metadata_builds(scene: Scene) -> None:
    scene.copy_stopped()
    code = (
        "import pickle, sys, pathlib\n"
        "from torch.distributed.checkpoint.metadata import TensorStorageMetadata\n"
        "from launcher.training.checkpoint import reader\n"
        "text = b'\\x80\\x02ctorch.distributed.checkpoint.metadata\\nTensorStorageMetadata\\n'\n"
        "text += b'N}X\\x04\\x00\\x00\\x00hackX\\x03\\x00\\x00\\x00yess\\x86b.'\n"
        "directory = pathlib.Path(sys.argv[1])\n"
        "(directory / '.metadata').write_bytes(text)\n"
        "try:\n    reader.CheckpointReader(directory)\nexcept Exception as error:\n    "
        "print(type(error).__name__, error)\n"
        "sys.exit(getattr(TensorStorageMetadata, 'hack', None) == 'yes')\n"
    )
    done = scene.python(code, str(scene.run.checkpoint(NEWEST)))
    scene.seen["line"] = (
        (done.stdout + done.stderr).strip().splitlines()[-1][:300] if done.stdout + done.stderr else ""
    )
    scene.check("no attribute of a class is set", done.returncode == 0)


@injection(
    "S12",
    "a model whose pytorch_model.bin has a payload",
    Expected((2,), "configuration", (), 60, resumes=False),
    ONE,
)
def payload(scene: Scene) -> None:
    model, victim = scene.folder / "model", scene.folder / "executed"
    shutil.copytree(scene.material.model, model)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    code = (
        "import os, sys, torch\n"
        "class Payload:\n    def __reduce__(self):\n        return os.system, (f'touch {sys.argv[2]}',)\n"
        "torch.save({'weight': Payload()}, sys.argv[1])\n"
    )
    scene.python(code, str(model / "pytorch_model.bin"), str(victim))
    scene.start("--force", changes={"model": {"name": str(model), "task": "causal-lm"}})
    scene.hit()
    scene.wait_end(90)
    scene.check("nothing is executed", not victim.exists())
    scene.check("nobody is told to set weights_only=False", "weights_only" not in scene.output())


@injection(
    "34, S12",
    "plan.json changed by hand between two attempts",
    Expected(codes=None, seconds=90, resumes=False),
    ONE,
)
def plan_changed_by_hand(scene: Scene) -> None:
    scene.copy_stopped()
    content = json.loads(scene.run.plan_file.read_text())
    content["training"]["learning_rate"] = 5.0
    scene.run.plan_file.write_text(json.dumps(content, indent=2))
    scene.start_again()
    scene.hit()
    scene.wait_end(90)
    scene.check(
        "it is refused, or said and written down",
        scene.process.returncode == 2 or "plan.json" in scene.output(),
    )  # type: ignore[union-attr]
