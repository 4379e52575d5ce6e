"""The rendered files: complete, held by golden ones, and safe with any name and path."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job as decide
from launcher.render import accelerate, deepspeed, presets, sbatch, torchrun
from launcher.render.engines import for_engine
from launcher.render.files import NAMES, files
from launcher.render.launch_paths import Place
from launcher.render.notes import notes
from launcher.render.write import write
from launcher.training import precision

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PLACE = Place("/shared/runs/example", "/shared/rendered")
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"cluster.time_limit": "8h", "cluster.partition": "gpu,long", "cluster.constraint": "rack1&ib"},
    "fsdp-hybrid": {"cluster.nodes": 2, "parallel.replicate": 2},
    "fsdp-gradients-offload": {"parallel.shard": "gradients", "memory.offload": "parameters"},
    "fsdp-none-compile": {"parallel.shard": "none", "model.compile": True},
    "fsdp-cpu": {"cluster.gpus_per_node": 0, "cluster.ranks_per_node": 2},
    "zero1-fp16": {"parallel.engine": "deepspeed", "parallel.shard": "optimizer", "precision": "fp16"},
    "zero2-optimizer-offload": {
        "parallel.engine": "deepspeed",
        "parallel.shard": "gradients",
        "memory.offload": "optimizer",
    },
    "zero3-two-nodes": {"parallel.engine": "deepspeed", "cluster.nodes": 2, "training.clip_norm": 0.0},
    "zero3-nvme": {
        "parallel.engine": "deepspeed",
        "memory.offload": "parameters",
        "memory.offload_to": "/mnt/nvme",
    },
    "zero3-cpu": {
        "parallel.engine": "deepspeed",
        "cluster.gpus_per_node": 0,
        "cluster.ranks_per_node": 2,
        "precision": "fp32",
    },
    "slurm-gpus-per-node": {
        "cluster.nodes": "2-4",
        "cluster.gpu_option": "gpus-per-node",
        "cluster.gpu_type": "h100",
        "cluster.exclusive": True,
        "cluster.modules": ["cuda/13.0"],
        "cluster.setup": ["source /opt/site.sh"],
        "cluster.environment": {"NCCL_DEBUG": "WARN"},
        "cluster.mail_user": "me@example.org",
        "cluster.mail_type": "END,FAIL",
        "cluster.sbatch": {"nice": 10, "contiguous": True},
    },
    "slurm-pyxis": {
        "cluster.gpu_type": "a100",
        "cluster.container": {
            "runtime": "pyxis",
            "image": "/images/train.sqsh",
            "mounts": ["/data", "/scratch:/tmp"],
            "options": ["--no-container-mount-home"],
        },
    },
    "slurm-apptainer": {
        "cluster.container": {
            "image": "/images/my train.sif",
            "mounts": ["/data"],
            "python": "/opt/venv/bin/python",
        },
        "cluster.requeue": False,
    },
}


def plan_of(keys: dict[str, Any]) -> Plan:
    return presets.plan({"training.max_steps": 10, **keys})


def values(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        for entry in content.values():
            yield from values(entry)
    elif isinstance(content, list):
        for entry in content:
            yield from values(entry)
    else:
        yield content


@pytest.mark.parametrize("case", CASES)
def test_files_are_the_golden_ones(case: str) -> None:
    made = files(plan_of(CASES[case]), PLACE)
    folder = GOLDEN / case
    if os.environ.get("UPDATE_GOLDEN") == "1":
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.iterdir():
            stale.unlink()
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
    stored = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert made == stored, "UPDATE_GOLDEN=1 writes them anew"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_open(case: str) -> None:
    made = files(plan_of(CASES[case]), PLACE)
    for name in ("ds_config.json", "accelerate.yaml", "plan.json"):
        if name in made:
            content = yaml.safe_load(made[name])
            assert content
            assert not {None, "auto"} & set(values(content))
    assert ("ds_config.json" in made) == case.startswith("zero")


def test_every_case_has_a_golden_folder_and_no_other_is_there() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == CASES.keys()


def test_the_batch_is_the_plans() -> None:
    plan = plan_of({"parallel.engine": "deepspeed"})
    made = deepspeed.config(plan)
    product = (
        made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * plan.mesh.world_size
    )
    assert made["train_batch_size"] == product == 64
    assert made["gradient_clipping"] == plan.training.clip_norm
    assert "optimizer" not in made and "scheduler" not in made


def test_fp16_scales_as_ours_does() -> None:
    fp16 = deepspeed.config(plan_of(CASES["zero1-fp16"]))["fp16"]
    ours = precision.LossScale(used=True)
    assert 2.0 ** fp16["initial_scale_power"] == ours.value
    for _ in range(fp16["loss_scale_window"] - 1):
        ours.good()
    assert ours.value == 2.0 ** fp16["initial_scale_power"]
    ours.good()
    assert ours.value == 2.0 ** (fp16["initial_scale_power"] + 1)
    assert (fp16["hysteresis"], fp16["loss_scale"]) == (1, 0)
    smallest = precision.LossScale(used=True, value=2.0)
    assert smallest.overflow() and smallest.value == fp16["min_loss_scale"] and not smallest.overflow()


def test_without_a_gpu_nothing_overlaps_and_nothing_is_pinned() -> None:
    plan = plan_of({**CASES["zero3-cpu"], "memory.offload": "parameters"})
    zero = deepspeed.config(plan)["zero_optimization"]
    assert not zero["overlap_comm"]
    assert not zero["offload_optimizer"]["pin_memory"] and not zero["offload_param"]["pin_memory"]


def test_a_buffer_for_files_holds_the_largest_piece() -> None:
    plan = plan_of(CASES["zero3-nvme"])
    buffer = deepspeed.config(plan)["zero_optimization"]["offload_param"]["buffer_size"]
    assert buffer * plan.mesh.world_size >= max(
        presets.EXAMPLE.table_parameters, presets.EXAMPLE.layer_parameters
    )
    older = plan.model_copy(
        update={"zero": plan.zero and plan.zero.model_copy(update={"largest_parameter": 0})}
    )
    assert deepspeed.config(older)["zero_optimization"]["offload_param"]["buffer_size"] > buffer, (
        "where it is not known, what may be whole"
    )


def test_a_plan_of_another_engine_has_no_deepspeed_file() -> None:
    with pytest.raises(ValueError, match=r"parallel\.engine: deepspeed"):
        deepspeed.config(plan_of({}))


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("fsdp", "FSDP"),
        ("fsdp-none-compile", "MULTI_GPU"),
        ("fsdp-cpu", "MULTI_CPU"),
        ("zero3-cpu", "DEEPSPEED"),
        ("fsdp-hybrid", "FSDP"),
    ],
)
def test_accelerates_word_for_it(case: str, kind: str) -> None:
    assert accelerate.config(plan_of(CASES[case]))["distributed_type"] == kind


def test_one_rank_is_no_distribution() -> None:
    plan = plan_of({"cluster.gpus_per_node": 1, "parallel.shard": "none"})
    assert accelerate.config(plan)["distributed_type"] == "NO"


def test_precision_stands_at_one_place() -> None:
    assert "mixed_precision" not in accelerate.config(plan_of(CASES["zero3-two-nodes"]))
    assert (
        accelerate.config(plan_of(CASES["zero3-two-nodes"]), "/a b/ds.json")["deepspeed_config"][
            "deepspeed_config_file"
        ]
        == "/a b/ds.json"
    )
    assert accelerate.config(plan_of(CASES["fsdp"]))["mixed_precision"] == "bf16"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"memory.activation_checkpointing": "selective"}, "selective"),
        (CASES["fsdp-cpu"], "MULTI_CPU"),
        (CASES["fsdp-none-compile"], "DistributedDataParallel"),
        (CASES["fsdp-hybrid"], "--machine_rank"),
        (CASES["zero3-cpu"], "gloo"),
        (CASES["zero3-nvme"], "gradient_checkpointing_enable"),
        ({"parallel.engine": "deepspeed", "parallel.shard": "optimizer"}, "BF16_Optimizer"),
        ({"parallel.engine": "deepspeed"}, "zero.prefetch_bucket_size"),
        ({}, "fp32"),
    ],
)
def test_what_the_files_cannot_say_is_said(keys: dict[str, Any], said: str) -> None:
    assert said in "\n".join(map(str, notes(plan_of(keys))))


def test_sizes_are_explained_where_the_stage_has_them() -> None:
    keys = {
        note.key for note in notes(plan_of({"parallel.engine": "deepspeed", "parallel.shard": "gradients"}))
    }
    assert "zero.allgather_bucket_size" in keys
    assert "zero.prefetch_bucket_size" not in keys


def job_of(keys: dict[str, Any]) -> Job:
    content: dict[str, Any] = {
        "name": "a",
        "model": {"name": "org/model"},
        "data": {"train": {"path": "a.txt"}, "text": "text"},
        "batch": {"global_batch_size": 64},
        "cluster": {"gpus_per_node": 8, "nodes": 2},
        "trackers": [],
    }
    for key, value in keys.items():
        section, _, name = key.partition(".")
        content[section] = {**content.get(section, {}), name: value}
    return Job.model_validate(content)


@pytest.mark.parametrize(
    ("keys", "engine", "expected", "noted"),
    [
        ({"parallel.shard": "optimizer"}, "fsdp", {"sharding": "gradients"}, "parallel.shard"),
        ({"memory.offload": "optimizer"}, "fsdp", {"offload": "parameters"}, "memory.offload"),
        (
            {"memory.offload": "optimizer", "memory.offload_to": "/mnt/nvme"},
            "fsdp",
            {"offload": "parameters", "offload_to": "cpu"},
            "memory.offload_to",
        ),
        (
            {"memory.offload": "optimizer", "cluster.gpus_per_node": 0, "cluster.ranks_per_node": 2},
            "fsdp",
            {"offload": "none"},
            "memory.offload",
        ),
        ({"parallel.secondary_shard": 8}, "fsdp", {"mesh.dp_replicate": 2}, "parallel.secondary_shard"),
        ({"parallel.secondary_shard": 16}, "fsdp", {"mesh.dp_replicate": 1}, "parallel.secondary_shard"),
        ({"parallel.quantized_weights": True}, "fsdp", {"sharding": "full"}, "parallel.quantized_weights"),
        ({"parallel.replicate": 2}, "deepspeed", {"zero.secondary_shard": 8}, "parallel.replicate"),
        (
            {"parallel.replicate": 2, "parallel.shard": "gradients"},
            "deepspeed",
            {"zero.secondary_shard": 1},
            "parallel.replicate",
        ),
        ({"parallel.shard": "none"}, "deepspeed", {"zero.stage": 1}, "parallel.shard"),
        ({"model.compile": True}, "deepspeed", {"model.compile": False}, "model.compile"),
        (
            {"memory.offload": "parameters", "parallel.shard": "gradients"},
            "deepspeed",
            {"offload": "optimizer"},
            "memory.offload",
        ),
        ({}, "deepspeed", {"zero.stage": 3}, ""),
        ({}, "fsdp", {"sharding": "full"}, ""),
    ],
)
def test_the_other_engine_takes_the_nearest(
    keys: dict[str, Any], engine: Any, expected: dict[str, Any], noted: str
) -> None:
    hardware = Hardware(64, 1 << 40)
    job = job_of(keys)
    plan = decide(job, hardware=hardware, local=False)
    changed, found = for_engine(job, plan, engine)
    other = decide(changed, hardware=hardware, local=False)
    assert other.engine == engine
    for key, value in expected.items():
        place: Any = other
        for part in key.split("."):
            place = getattr(place, part)
        assert place == value, key
    assert noted in {note.key for note in found} or (not noted and not found)
    same = ("precision", "activation_checkpointing", "batch", "training")
    assert [getattr(other, name) for name in same] == [getattr(plan, name) for name in same]


def test_presets_are_what_the_renderer_gives() -> None:
    stored = {
        path.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "ds_configs").iterdir()
        if path.suffix in (".json", ".yaml")
    }
    assert stored == presets.presets(), "run `make docs`"
    readme = (ROOT / "ds_configs" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in readme for name in stored)


def test_presets_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["presets", str(tmp_path / "new")])
    presets.main()
    assert {path.name for path in (tmp_path / "new").iterdir()} == presets.JOBS.keys()


HOSTILE = [
    "plain",
    "with space",
    'it\'s "quoted"',
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned;b",
    "a&b|c>d<e",
    "*?[x]{y,z}~!",
    "-rf",
    "--dash",
    "100%j",
    "back\\slash",
    "ünïcödé 模型",
    "$HOME ${PATH}",
    "#hash",
]
_SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
_PYTHON = """#!/bin/bash
case "$*" in
  *slurm.after*) printf '%s\\0' "$@" > "$HOME/after"; exit "${@: -1}" ;;
  *) printf '%s\\0' "$@" > "$HOME/said" ;;
esac
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def fakes(tmp_path: Path) -> dict[str, str]:
    """A PATH in front of which srun is ours."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    executable(folder / "srun", _SRUN)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["submit.sbatch", "torchrun.txt"])
def test_no_path_escapes_its_quotes(name: str, kind: str, tmp_path: Path, fakes: dict[str, str]) -> None:
    rendered, run, folder = tmp_path / "rendered" / name, tmp_path / "runs" / name, tmp_path / "bin" / name
    folder.mkdir(parents=True)
    executable(folder / "python", _PYTHON)
    plan = plan_of(
        {"cluster.nodes": 2, "cluster.time_limit": "1h", "cluster.constraint": name.replace("\\", "")}
    )
    write(rendered, files(plan, Place(str(run), str(rendered), str(folder / "python"))))
    script = rendered / kind
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    fakes |= {"HEAD": "node-a", "NODE": "1"}
    done = subprocess.run(
        ["bash", script], env=fakes, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    said = said_to(tmp_path / "said")
    if kind == "submit.sbatch":
        assert said == ["-u", "-m", "launcher.launch.slurm.node", str(run)]
        assert said_to(tmp_path / "after") == ["-m", "launcher.launch.slurm.after_job", str(run), "0"]
    else:
        assert said[:2] == ["-m", "launcher.launch.agent"] and "--rdzv-endpoint=node-a:29500" in said
        assert said[said.index("launcher.training.entry") + 1 :] == [str(run), "--attempt", "1"]
    assert not list(tmp_path.rglob("pwned"))
    assert Plan.read(run / "plan.json") == plan
    assert (run / "rendered" / "accelerate.yaml").exists()


def said_to(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\0")[:-1]


@pytest.mark.parametrize(
    ("srun", "code"),
    [("exit 41", 41), ("kill -TERM $PPID; kill -USR2 $PPID; exit 7", 7)],
    ids=["failed", "signalled"],
)
def test_what_comes_after_hears_how_the_ranks_left(
    srun: str, code: int, tmp_path: Path, fakes: dict[str, str]
) -> None:
    executable(tmp_path / "fakes" / "srun", f"#!/bin/bash\n{srun}\n")
    executable(tmp_path / "python", _PYTHON)
    write(
        tmp_path / "r",
        files(plan_of({}), Place(str(tmp_path / "run"), str(tmp_path / "r"), str(tmp_path / "python"))),
    )
    assert (
        subprocess.run(["bash", tmp_path / "r" / "submit.sbatch"], env=fakes, timeout=600).returncode == code
    )
    assert said_to(tmp_path / "after")[-1] == str(code)


@pytest.mark.parametrize("setup", ["false", "module load nothing-of-that-name"])
def test_a_line_of_the_setup_that_fails_ends_the_job_before_the_ranks(
    setup: str, tmp_path: Path, fakes: dict[str, str]
) -> None:
    executable(tmp_path / "python", _PYTHON)
    plan = plan_of({"cluster.setup": [setup]})
    write(
        tmp_path / "r",
        files(plan, Place(str(tmp_path / "run"), str(tmp_path / "r"), str(tmp_path / "python"))),
    )
    assert (
        subprocess.run(
            ["bash", tmp_path / "r" / "submit.sbatch"], env=fakes, timeout=600, capture_output=True
        ).returncode
        != 0
    )
    assert said_to(tmp_path / "after")[-1] != "0"
    assert not (tmp_path / "said").exists()


def test_the_ranks_see_what_the_job_file_sets(tmp_path: Path, fakes: dict[str, str]) -> None:
    executable(tmp_path / "python", '#!/bin/bash\nenv > "$HOME/$(basename "$3").env"\n')
    hostile = "a b $(touch pwned) \"' %"
    plan = plan_of(
        {
            "cluster.environment": {"MINE": hostile},
            "cluster.setup": ["module_path=x", "export FROM_SETUP=$module_path"],
        }
    )
    place = Place(str(tmp_path / "run"), str(tmp_path / "r"), str(tmp_path / "python"), "/the code")
    write(tmp_path / "r", files(plan, place))
    subprocess.run(
        ["bash", tmp_path / "r" / "submit.sbatch"],
        env={**fakes, "PYTHONPATH": "/theirs"},
        cwd=tmp_path,
        timeout=600,
        check=True,
    )
    seen = dict(
        line.partition("=")[::2]
        for line in (tmp_path / "launcher.launch.slurm.node.env").read_text().splitlines()
    )
    assert (seen["MINE"], seen["FROM_SETUP"], seen["PYTHONPATH"]) == (hostile, "x", "/the code:/theirs")
    assert not (tmp_path / "pwned").exists()


def as_sbatch_reads(text: str) -> list[str]:
    """The words of an #SBATCH line by sbatch's own rule: both quotes group, a backslash escapes everywhere, a
    bare # ends the line."""
    words: list[str] = []
    word, quote, index = None, "", 0
    while index < len(text):
        sign = text[index]
        index += 1
        if sign == "\\":
            word, index = (word or "") + text[index : index + 1], index + 1
        elif quote:
            word, quote = (word or "", "") if sign == quote else ((word or "") + sign, quote)
        elif sign in "'\"":
            word, quote = word or "", sign
        elif sign == "#":
            break
        elif sign.isspace():
            words, word = ([*words, word], None) if word is not None else (words, word)
        else:
            word = (word or "") + sign
    return words if word is None else [*words, word]


@pytest.mark.parametrize("value", [*HOSTILE, "[rack1|rack2]*2", "a  b ", "'", '"', "\\", 'a\\"b'])
def test_slurm_reads_each_option_as_it_was_meant(value: str) -> None:
    script = sbatch.script(plan_of({"cluster.constraint": value, "cluster.account": value}), PLACE)
    lines = [
        as_sbatch_reads(line.removeprefix("#SBATCH "))
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert [f"--constraint={value}"] in lines and [f"--account={value}"] in lines
    assert all(len(words) == 1 for words in lines)


def test_options_of_slurm() -> None:
    options = {"partition": "gpu", "constraint": 'a "b" \\c', "mem": "0"}
    plan = plan_of(
        {"cluster.time_limit": "90min", **{f"cluster.{name}": value for name, value in options.items()}}
    )
    lines = sbatch.script(plan, PLACE).splitlines()
    assert "#SBATCH --partition=gpu" in lines
    assert '#SBATCH --constraint="a \\"b\\" \\\\c"' in lines
    assert "#SBATCH --time=90" in lines
    assert "#SBATCH --signal=USR2@30" in lines
    assert "#SBATCH --gres=gpu:8" in lines
    assert "#SBATCH --output=/shared/rendered/slurm-%j.out" in lines
    assert not any("--gres" in line for line in sbatch.script(plan_of(CASES["fsdp-cpu"]), PLACE).splitlines())
    assert not any("--time" in line for line in sbatch.script(plan_of({}), PLACE).splitlines())


@pytest.mark.parametrize("path", ["/a\nb", "/a\rb", "/a\x00b", "relative/path"])
@pytest.mark.parametrize("which", ["run", "rendered"])
def test_paths_that_no_script_can_carry_are_refused(path: str, which: str) -> None:
    with pytest.raises(ConfigurationError, match=r"control character|is relative"):
        Place(**{"run": "/run", "rendered": "/rendered", which: path})


def test_a_python_with_a_line_break_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="control character"):
        Place("/run", "/rendered", "py\nthon")


def test_who_starts_by_hand_meets_where_others_cannot_reach_it() -> None:
    for nodes in (1, 2):
        said = torchrun.command(plan_of({"cluster.nodes": nodes}), PLACE)
        assert "--rdzv-backend=launcher" in said and "--rdzv-id" not in said, (
            "c10d unpickles what is sent to a port"
        )


def test_writing_replaces_and_takes_stale_files_away(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write(out, files(plan_of({"parallel.engine": "deepspeed"}), PLACE), NAMES)
    (out / "mine.txt").write_text("stays")
    write(out, files(plan_of({}), PLACE), NAMES)
    assert {path.name for path in out.iterdir()} == set(NAMES) - {"ds_config.json"} | {"mine.txt"}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match="name a"):
            write(out, {"a": "b"})
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_written_where_one_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigurationError, match="is a directory"):
        write(tmp_path, {"a": "1", "b": "2"})
    assert not (tmp_path / "a").exists()


def test_plan_json_is_the_plan() -> None:
    plan = plan_of({})
    assert Plan.model_validate(json.loads(files(plan, PLACE)["plan.json"])) == plan
