"""Every `auto` is decided, with a reason; what cannot run is refused with the nearest that can."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigurationError
from launcher.job.check_training import findings
from launcher.job.schema import Job
from launcher.launch.redecide import decide_again
from launcher.planner.changes import changes, check
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import Plan
from launcher.planner.search import plan_job
from launcher.render.notes import notes

GIB = 1 << 30
CPU = Hardware(8, 32 * GIB, frozenset({"avx2"}), (), "there is no nvidia-smi on this machine")
AMX = Hardware(8, 32 * GIB, frozenset({"amx_bf16"}))
H100 = Hardware(32, 256 * GIB, frozenset({"amx_bf16"}), (Gpu("H100", 80 * GIB, 9.0),) * 4)
T4 = Hardware(8, 64 * GIB, frozenset(), (Gpu("T4", 16 * GIB, 7.5),))
CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "intermediate_size": 1408,
    "vocab_size": 32000,
    "num_attention_heads": 8,
    "hidden_act": "silu",
}


def job(**keys: Any) -> Job:
    """A causal-LM job; `section__key=value` sets a key."""
    content: dict[str, Any] = {
        "name": "run",
        "model": {"name": "org/model"},
        "data": {"train": {"path": "/train.jsonl"}, "text": "body"},
    }
    for key, value in keys.items():
        *sections, last = key.split("__")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Job.model_validate(content)


def classification(**keys: Any) -> Job:
    return job(model__task="sequence-classification", data__label="intent", **keys)


def decided(made: Plan) -> dict[str, object]:
    return {decision.key: decision.value for decision in made.decisions}


def refusal(key: str, *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        plan_job(*arguments, **keywords)
    return next(problem.reason for problem in caught.value.problems if problem.key == key)


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}")]
    if isinstance(value, list):
        return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, f"{path}.{index}")]
    return [(path, value)]


@pytest.mark.parametrize(
    "made",
    [
        job(),
        classification(),
        job(
            data__evaluation={"path": "/t.csv"}, training__evaluate_every="epoch", training__early_stopping={}
        ),
    ],
)
@pytest.mark.parametrize("machine", [CPU, AMX, H100, T4], ids=["cpu", "amx", "h100", "t4"])
def test_a_plan_leaves_nothing_open(made: Job, machine: Hardware) -> None:
    text = plan_job(made, hardware=machine).to_json()
    open_ends = [path for path, value in leaves(json.loads(text)) if value in ("auto", None)]
    assert open_ends == []
    assert Plan.model_validate_json(text) == plan_job(made, hardware=machine)


def test_every_auto_of_the_job_is_decided_with_a_reason() -> None:
    made = plan_job(job(), hardware=H100)
    autos = {path.lstrip(".") for path, value in leaves(job().model_dump(mode="json")) if value == "auto"}
    assert autos - {"cluster.hang_after"} <= set(decided(made)), (
        "that one is decided while the run goes on, phase by phase"
    )
    assert all(decision.reason for decision in made.decisions)


def test_what_is_asked_for_is_not_decided() -> None:
    asked = job(
        model__attention="eager",
        data__num_workers=3,
        batch__micro_batch_size=4,
        training__epochs=2,
        precision="fp16",
        memory={"activation_checkpointing": "full", "offload": "none"},
        parallel={"engine": "fsdp", "shard": "gradients"},
        cluster={"gpus_per_node": 0, "ranks_per_node": 2, "threads_per_rank": 1},
        trackers=[],
    )
    made = plan_job(asked, hardware=CPU)
    assert made.decisions == ()
    assert (made.precision, made.attention, made.activation_checkpointing, made.num_data_workers) == (
        "fp16",
        "eager",
        "full",
        3,
    )
    assert made.mesh.model_dump() == {
        "nodes": 1, "ranks_per_node": 2, "world_size": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 1, "ep": 1,
        "reshard_after_forward": False, "device": "cpu", "threads_per_rank": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "machine", "compiled", "reason"),
    [
        ({}, H100, True, "a layer of llama is one graph"),
        ({}, CPU, False, "on a CPU it was not measured"),
        ({"parallel__engine": "deepspeed"}, H100, False, "for parallel.engine: fsdp"),
        ({"model__adapter": {}}, H100, False, "layers with adapters"),
        ({"model__attention": "sdpa"}, H100, True, "a layer of llama is one graph"),
        ({"model__attention": "eager"}, H100, False, "only layers over packed samples"),
        ({"model__config": CONFIG | {"model_type": "starcoder2"}}, H100, False, "of starcoder2 it is"),
        ({"model__config": None}, H100, False, "of this model it is not known"),
    ],
)
def test_compiling_is_decided(
    keys: dict[str, Any], machine: Hardware, compiled: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    asked = job(**{"model__config": CONFIG} | keys, model__compile="auto")
    made = plan_job(asked, 1, machine)
    assert made.model.compile is compiled
    [said] = [one for one in made.decisions if one.key == "model.compile"]
    assert said.value is compiled and reason in said.reason
    assert not plan_job(job(), 1, H100).model.compile, "the default"


@pytest.mark.parametrize(
    ("machine", "nproc", "ranks", "threads", "device"),
    [
        (CPU, None, 1, 8, "cpu"),
        (CPU, 2, 2, 4, "cpu"),
        (CPU, 16, 16, 1, "cpu"),
        (H100, None, 4, 8, "cuda"),
        (H100, 2, 2, 16, "cuda"),
    ],
)
def test_ranks(machine: Hardware, nproc: int | None, ranks: int, threads: int, device: str) -> None:
    mesh = plan_job(job(), nproc, machine).mesh
    assert (mesh.ranks_per_node, mesh.threads_per_rank, mesh.device) == (ranks, threads, device)


def test_nproc_counts_more_than_the_job() -> None:
    assert plan_job(job(cluster__ranks_per_node=4), 2, CPU).mesh.world_size == 2


@pytest.mark.parametrize(
    ("machine", "precision"),
    [
        (CPU, "fp32"),
        (AMX, "bf16"),
        (Hardware(1, GIB, frozenset({"avx512_bf16"})), "bf16"),
        (H100, "bf16"),
        (T4, "fp16"),
    ],
)
def test_precision(machine: Hardware, precision: str) -> None:
    assert plan_job(job(), hardware=machine).precision == precision


def test_attention() -> None:
    assert plan_job(job(), hardware=CPU).attention == "packed"
    assert plan_job(job(model__attention="sdpa"), hardware=CPU).attention == "packed"
    assert plan_job(job(model__attention="eager"), hardware=CPU).attention == "eager"
    assert plan_job(classification(), hardware=CPU).attention == "sdpa"
    assert plan_job(job(), hardware=CPU).model.attention == "sdpa"


@pytest.mark.parametrize(
    ("keys", "nproc", "expected"),
    [
        ({}, 1, (1, 1, False)),
        ({}, 4, (1, 4, True)),
        ({"parallel__replicate": 2}, 4, (2, 2, True)),
        ({"parallel__replicate": 4}, 4, (4, 1, False)),
        ({"parallel__shard": "none"}, 4, (4, 1, False)),
        ({"parallel__shard": "gradients"}, 4, (1, 4, False)),
    ],
)
def test_mesh(keys: dict[str, Any], nproc: int, expected: tuple[int, int, bool]) -> None:
    mesh = plan_job(job(**keys), nproc, CPU).mesh
    assert (mesh.dp_replicate, mesh.dp_shard, mesh.reshard_after_forward) == expected
    assert mesh.dp_replicate * mesh.dp_shard == mesh.world_size == nproc


def test_refused_meshes() -> None:
    assert "the nearest that work: 2 or 4" in refusal(
        "parallel.replicate", job(parallel__replicate=3), 4, CPU
    )
    assert "write 4" in refusal("parallel.replicate", job(parallel={"replicate": 2, "shard": "none"}), 4, CPU)
    assert "at least one" in refusal("--nproc", job(), 0, CPU)
    assert "there are 4" in refusal("--nproc", job(), 8, H100)
    assert "there are 4" in refusal("cluster.ranks_per_node", job(cluster__ranks_per_node=2), None, H100)


def test_gpus_that_are_not_there() -> None:
    reason = refusal("cluster.gpus_per_node", job(cluster__gpus_per_node=2), None, CPU)
    assert "0 seen" in reason and "no nvidia-smi" in reason and "write 0 to train on the CPU" in reason
    assert "4 seen" in refusal("cluster.gpus_per_node", job(cluster__gpus_per_node=8), None, H100)
    assert plan_job(job(cluster__gpus_per_node=0), hardware=H100).mesh.device == "cpu"
    assert plan_job(job(cluster__gpus_per_node=2), hardware=H100).mesh.world_size == 2


def test_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = job(model__attention="flash_attention_2")
    assert "needs a GPU" in refusal("model.attention", wanted, None, CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in refusal("model.attention", wanted, None, H100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert plan_job(wanted, hardware=H100).attention == "flash_attention_2"


def test_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "tensorboard" or None)
    assert plan_job(job(), hardware=CPU).trackers == ("tensorboard",)
    assert "not installed" in refusal("trackers", job(trackers=["wandb"]), None, CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan_job(job(), hardware=CPU).trackers == ()


def test_where_trackers_keep_a_run_may_change_and_decides_no_number() -> None:
    before, after = (
        plan_job(job(**more), hardware=CPU) for more in ({}, {"tracking": {"group": "ablation"}})
    )
    assert before.tracking is None and '"tracking"' not in before.to_json()
    assert after.tracking is not None and after.tracking.group == "ablation"
    assert [change.key for change in check(before, after)] == ["tracking.group", "tracking.tags"]
    assert before.digest() == after.digest()


def test_all_refusals_at_once() -> None:
    wrong = job(cluster__gpus_per_node=3, parallel__replicate=2, model__attention="flash_attention_2")
    with pytest.raises(ConfigurationError) as caught:
        plan_job(wrong, hardware=CPU)
    assert {problem.key for problem in caught.value.problems} >= {
        "cluster.gpus_per_node",
        "parallel.replicate",
    }


def test_a_batch_that_does_not_divide_is_told_with_the_rest_unless_ranks_are_in_doubt() -> None:
    def keys(wanted: Job, nproc: int | None) -> set[str]:
        with pytest.raises(ConfigurationError) as caught:
            plan_job(wanted, nproc, hardware=CPU)
        return {problem.key for problem in caught.value.problems}

    wrong = job(model__attention="flash_attention_2")
    assert keys(wrong, 3) == {"model.attention", "batch.global_batch_size"}
    assert keys(wrong, 2) == {"model.attention"}
    assert keys(job(cluster__gpus_per_node=3), None) == {"cluster.gpus_per_node"}


def test_batch_that_does_not_divide() -> None:
    assert "global_batch_size 30 or 33" in refusal("batch.global_batch_size", job(), 3, CPU)


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ({}, (1, "epochs")),
        ({"training__epochs": 2.5}, (2.5, "epochs")),
        ({"training__max_steps": 7}, (7, "steps")),
    ],
)
def test_length(keys: dict[str, Any], length: tuple[float, str]) -> None:
    made = plan_job(job(**keys), hardware=CPU)
    assert (made.length.value, made.length.unit) == length


def model(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return str(folder)


def test_less_memory_means_more_recomputation_and_a_smaller_pass(tmp_path: Path) -> None:
    local = job(model__name=model(tmp_path), data__max_length=512, batch__global_batch_size=64)
    plans = [plan_job(local, hardware=Hardware(8, int(gib * GIB))) for gib in (32, 3, 1.4, 0.5)]
    order = ["none", "selective", "full"]
    ways = [order.index(made.activation_checkpointing) for made in plans]
    assert ways == sorted(ways) and ways[0] == 0 and ways[-1] == 2
    assert plans[0].batch.micro_batch_size > plans[-1].batch.micro_batch_size == 1
    assert "needs the least; nothing fits" in next(
        d.reason for d in plans[-1].decisions if d.key == "memory.activation_checkpointing"
    )


def test_gpus_that_nobody_named_are_said_to_be_unknown(tmp_path: Path) -> None:
    """On a login node everything is computed again, which is slower: the plan says so, and what to write."""
    keys = {"model__name": model(tmp_path), "cluster__gpus_per_node": 8, "batch__global_batch_size": 64}
    blind = plan_job(job(**keys), hardware=CPU, local=False)
    said = blind.blind()
    assert said is not None and "cluster.gpu" in said and "activation_checkpointing = full" in said
    assert said in [note.text for note in notes(blind)]
    named = plan_job(job(**keys, cluster__gpu="h100-80gb"), local=False)
    assert named.blind() is None and named.activation_checkpointing != "full"


def test_sharding_leaves_more_memory(tmp_path: Path) -> None:
    machine = Hardware(8, 256 * GIB, frozenset(), (Gpu("small", int(3.2 * GIB), 9.0),) * 4)
    local = job(
        model__name=model(tmp_path, num_hidden_layers=24), data__max_length=1024, memory__offload="none"
    )
    alone, four = plan_job(local, 1, machine), plan_job(local, 4, machine)
    order = ["none", "selective", "full"]
    assert order.index(alone.activation_checkpointing) > order.index(four.activation_checkpointing)


def test_shape_from_config_and_from_headers(tmp_path: Path) -> None:
    name = model(tmp_path)
    section = job(model__name=name).model
    by_config = ModelShape.read(section)
    assert (
        by_config is not None and by_config.num_parameters == 8 * (4 * 512**2 + 3 * 512 * 1408) + 32000 * 512
    )
    header = json.dumps(
        {"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}, "__metadata__": {}}
    ).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    by_header = ModelShape.read(section)
    assert by_header is not None and by_header.num_parameters == 15
    made_up = ModelShape.read(section.model_copy(update={"weights": "random"}))
    assert made_up == by_config
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    assert ModelShape.read(section) == by_config


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "x"}'])
def test_shape_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert ModelShape.read(job(model__name=str(tmp_path)).model) is None
    assert plan_job(job(model__name=str(tmp_path)), hardware=CPU).activation_checkpointing == "full"


def test_shape_of_nested_and_older_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"n_embd": 8, "n_layer": 2}}))
    shape = ModelShape.read(job(model__name=str(tmp_path)).model)
    assert shape is not None and (shape.hidden_size, shape.num_layers, shape.intermediate_size) == (8, 2, 32)


@pytest.mark.parametrize(
    ("sizes", "table"),
    [
        ({"vocab_size": 100}, 100 * 8),
        ({"vocab_size": 100, "max_position_embeddings": 50}, 100 * 8),
        ({"vocab_size": 100, "max_position_embeddings": 1 << 20}, 100 * 8),
        ({"vocab_size": 100, "n_positions": 120, "tie_word_embeddings": False}, 120 * 8),
    ],
)
def test_the_largest_table(sizes: dict[str, Any], table: int, tmp_path: Path) -> None:
    """Of words, or of positions; rotary positions, of which a config names as many as it likes, have none."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_hidden_layers": 2} | sizes))
    shape = ModelShape.read(job(model__name=str(tmp_path)).model)
    assert shape is not None and shape.table_parameters == table


def test_digest_follows_what_decides_the_numbers() -> None:
    base = plan_job(job(), 2, CPU)
    assert (
        base.digest()
        == plan_job(job(cluster__grace="2min", cluster__hang_after="5min", trackers=[]), 2, CPU).digest()
    )
    hang_after = [
        plan_job(job(cluster__hang_after=value), 2, CPU).hang_after for value in ("auto", "off", "5min")
    ]
    assert hang_after == [None, "off", 300.0]
    assert base.digest() != plan_job(job(training__seed=18), 2, CPU).digest()
    assert base.digest() != plan_job(job(), 4, CPU).digest()


def test_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = plan_job(job(), 2, CPU)
    (tmp_path / "plan.json").write_text(made.to_json())
    assert Plan.read(tmp_path / "plan.json") == made


DEEPSPEED = {"parallel__engine": "deepspeed"}


@pytest.fixture
def deepspeed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning asks only whether the package is installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "deepspeed" else found(name)
    )


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"parallel__shard": "optimizer"}, "parallel.shard: optimizer"),
        ({"memory__offload": "optimizer"}, "memory.offload: optimizer"),
        ({"parallel__secondary_shard": 2}, "ZeRO++"),
    ],
)
@pytest.mark.usefixtures("deepspeed_is_there")
def test_the_engine_is_the_one_that_can(keys: dict[str, Any], reason: str) -> None:
    made = plan_job(job(**keys), 2, CPU)
    [decision] = [decision for decision in made.decisions if decision.key == "parallel.engine"]
    assert made.engine == "deepspeed" and reason in decision.reason
    assert plan_job(job(), 2, CPU).engine == "fsdp"


@pytest.mark.parametrize(
    ("shard", "stage"), [("full", 3), ("gradients", 2), ("optimizer", 1), ("none", 1), ("auto", 3)]
)
@pytest.mark.usefixtures("deepspeed_is_there")
def test_stages_of_deepspeed(shard: str, stage: int) -> None:
    made = plan_job(job(parallel__shard=shard, **DEEPSPEED), 2, CPU)
    assert made.zero is not None and made.zero.stage == stage
    assert (made.mesh.dp_replicate, made.mesh.dp_shard) == (1, 2)
    if shard == "none":
        assert "stage 0" in next(
            decision.reason for decision in made.decisions if decision.key == "parallel.shard"
        )


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        ({"parallel__engine": "fsdp", "parallel__shard": "optimizer"}, "parallel.shard", "write gradients"),
        ({"parallel__engine": "fsdp", "memory__offload": "optimizer"}, "memory.offload", "write parameters"),
        ({"parallel__engine": "fsdp", "memory__offload": "parameters"}, "memory.offload", "write none"),
        (
            {"parallel__engine": "fsdp", "memory__offload": "parameters", "memory__offload_to": "/nvme"},
            "memory.offload_to",
            "host's memory alone",
        ),
        (
            {"parallel__engine": "fsdp", "parallel__secondary_shard": 2},
            "parallel.secondary_shard",
            "parallel.replicate",
        ),
        (
            {"parallel__engine": "fsdp", "parallel__quantized_weights": True},
            "parallel.quantized_weights",
            "ZeRO++",
        ),
        (
            {"parallel__engine": "fsdp", "parallel__quantized_gradients": True},
            "parallel.quantized_gradients",
            "ZeRO++",
        ),
        ({**DEEPSPEED, "training__optimizer": "muon"}, "training.optimizer", "write parallel.engine: fsdp"),
        (
            {"training__optimizer": "muon", "memory__offload": "parameters", "parallel__engine": "fsdp"},
            "memory.offload",
            "Muon multiplies whole matrices",
        ),
        (
            {
                **DEEPSPEED,
                "training__moments": "bf16",
                "memory__offload": "optimizer",
                "memory__offload_to": "/",
            },
            "training.moments",
            "DeepSpeed's files hold fp32 alone; write offload_to: cpu",
        ),
        (
            {**DEEPSPEED, "training__moments": "8bit"},
            "training.moments",
            "has a scale for each block of a matrix's rows, and ZeRO cuts parameters into flat pieces",
        ),
        (
            {"training__moments": "8bit", "memory__offload": "parameters", "parallel__engine": "fsdp"},
            "memory.offload",
            "moments in 8 bits are stepped, on the device; write none, or training.moments: bf16",
        ),
        (
            {**DEEPSPEED, "training__optimizer": "adafactor"},
            "training.optimizer",
            "works on matrices, by whole ones or by rows and columns, and ZeRO cuts parameters into flat pieces",
        ),
        (
            {"training__optimizer": "adafactor", "memory__offload": "parameters", "parallel__engine": "fsdp"},
            "memory.offload",
            "Adafactor adds up columns over the ranks, on the device; write none",
        ),
        (
            {**DEEPSPEED, "model__adapter": {"dora": True}},
            "model.adapter.dora",
            "write parallel.shard: gradients",
        ),
        (
            {**DEEPSPEED, "training__ema": {}, "memory__offload": "optimizer", "memory__offload_to": "/"},
            "training.ema",
            "write offload_to: cpu",
        ),
        (
            {
                **DEEPSPEED,
                "training__l2_sp": {"alpha": 1},
                "memory__offload": "optimizer",
                "memory__offload_to": "/",
            },
            "training.l2_sp",
            "write offload_to: cpu",
        ),
        ({**DEEPSPEED, "parallel__replicate": 2}, "parallel.replicate", "ZeRO cuts over all ranks"),
        ({**DEEPSPEED, "model__compile": True}, "model.compile", "for parallel.engine: fsdp"),
        (
            {**DEEPSPEED, "memory__offload": "parameters", "parallel__shard": "gradients"},
            "memory.offload",
            "only ZeRO-3",
        ),
        (
            {**DEEPSPEED, "parallel__secondary_shard": 2, "parallel__shard": "optimizer"},
            "parallel.shard",
            "part of ZeRO-3",
        ),
        (
            {**DEEPSPEED, "parallel__secondary_shard": 3},
            "parallel.secondary_shard",
            "cannot be cut into groups",
        ),
        ({**DEEPSPEED, "parallel__quantized_weights": True}, "parallel.quantized_weights", "no operator"),
        ({**DEEPSPEED, "parallel__quantized_gradients": True}, "parallel.quantized_gradients", "no operator"),
        ({**DEEPSPEED, "memory__offload_to": "/"}, "memory.offload_to", "nothing is offloaded"),
        (
            {**DEEPSPEED, "memory__offload": "optimizer", "memory__offload_to": "/no/such"},
            "memory.offload_to",
            "no such directory",
        ),
        (
            {**DEEPSPEED, "memory__offload": "optimizer", "memory__offload_to": "/proc"},
            "memory.offload_to",
            "cannot be written to",
        ),
        ({"cluster__nodes": 2}, "cluster.nodes", "launcher submit"),
    ],
)
@pytest.mark.usefixtures("deepspeed_is_there")
def test_what_an_engine_cannot_is_refused_with_the_nearest(
    keys: dict[str, Any], key: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != "/proc")
    assert reason in refusal(key, job(**keys), 2, CPU)


@pytest.mark.usefixtures("deepspeed_is_there")
def test_files_need_what_their_operator_is_compiled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(memory__offload="optimizer", memory__offload_to=str(tmp_path), **DEEPSPEED)
    monkeypatch.setattr("launcher.planner.resolve.sharding._HEADERS", ())
    assert "install libaio-dev" in refusal("memory.offload_to", wanted, 2, CPU)
    (tmp_path / "libaio.h").touch()
    monkeypatch.setenv("CPATH", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program, path: None)
    assert "ninja and c++" in refusal("memory.offload_to", wanted, 2, CPU)
    monkeypatch.setattr("shutil.which", lambda program, path: program)
    made = plan_job(wanted, 2, CPU)
    assert (made.offload, made.offload_to) == ("optimizer", str(tmp_path))
    assert made.checkpoint.asynchronous is False and decided(made)["checkpoint.async"] is False


def test_a_missing_deepspeed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name)
    )
    assert "pip install" in refusal("parallel.engine", job(**DEEPSPEED), 2, CPU)
    assert plan_job(job(**DEEPSPEED), 2, CPU, local=False).engine == "deepspeed"


def test_buckets_are_a_layer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    made = plan_job(job(model__name=str(tmp_path), **DEEPSPEED), 2, CPU, local=False)
    assert made.zero is not None
    layer = 4 * 512 * 512 + 3 * 512 * 1408
    assert made.zero.reduce_bucket_size == made.zero.prefetch_bucket_size == layer
    assert made.zero.persistence_threshold == 5120
    reasons = {decision.key: decision.reason for decision in made.decisions}
    assert "one layer" in reasons["zero.reduce_bucket_size"]
    unknown = plan_job(job(**DEEPSPEED), 2, CPU, local=False)
    assert unknown.zero is not None and unknown.zero.reduce_bucket_size == 500_000_000


def test_a_plan_for_another_cluster() -> None:
    made = plan_job(
        job(
            cluster={"nodes": 2, "gpus_per_node": 8, "time_limit": "8h", "partition": "gpu"},
            batch__global_batch_size=64,
        ),
        None,
        CPU,
        local=False,
    )
    assert (made.mesh.world_size, made.mesh.device, made.precision) == (16, "cuda", "bf16")
    assert made.activation_checkpointing == "full" and "no config.json of org/model" in str(
        [decision.reason for decision in made.decisions]
    )
    assert made.slurm.time_limit_minutes == 480 and made.slurm.options == {"partition": "gpu"}


def test_a_run_of_before_keeps_the_defaults_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of before 2026-11-30 has another power and shape of the fall, whatever its schedule."""
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: CPU))
    for keys in ({}, {"training__schedule": "polynomial"}, {"training__schedule": "warmup-stable-decay"}):
        again = job(**keys)
        plan = plan_job(again, hardware=CPU)
        earlier = plan.training.model_copy(update={"power": 2.0, "decay_shape": "linear"})
        stored = plan.model_copy(update={"training": earlier})
        assert decide_again(again, None, stored, local=True).training == earlier
        assert decide_again(again, None, plan, local=True).training == plan.training
    asked = decide_again(job(**keys, training__decay_shape="cosine"), None, stored, local=True)
    assert [change.key for change in changes(stored, asked)] == ["training.decay_shape"]
    assert not list(findings(job(training__power=2.0, training__decay_shape="linear")))
    [one] = findings(job(training__power=3.0))
    assert "is a key of the schedule polynomial" in str(one)
