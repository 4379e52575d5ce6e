"""DeepSpeed gives FSDP's numbers, and its state goes through the same checkpoints, to and from any engine and
number of ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.training.checkpoint.export import export
from launcher.training.engines import build
from launcher.training.engines.deepspeed_setup import without_hooks
from launcher.training.engines.operators import build_operators
from launcher.training.engines.unshard import cut_rows
from launcher.training.model import attention
from tests.tiers import slow_but
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import assert_equal, batch_of, curve, finish, named, new_run, plan_for, state
from tests.training.test_engine import Causal, _batch, _check, _ran, _save, steps
from tests.training.test_resume import compare, go_on

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


STATES: dict[str, dict[str, Any]] = {
    "ZeRO-1": deepspeed(1),
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3),
    "ZeRO-2, optimizer offloaded": deepspeed(2, offload="optimizer"),
    "ZeRO-3, optimizer offloaded": deepspeed(3, offload="optimizer"),
    "ZeRO-3, parameters offloaded": deepspeed(3, offload="parameters"),
    "ZeRO-3, recomputing": deepspeed(3, activation_checkpointing="full"),
    "ZeRO-1, recomputing": deepspeed(1, activation_checkpointing="selective"),
}
WEIGHT_DECAY = {"training": {"max_steps": 4, "weight_decay": 0.1}}
SGD = {"training": {"max_steps": 4, "weight_decay": 0.1, "optimizer": "sgd"}}
FROZEN = {"model__freeze": ("model.embed_tokens.*", "model.layers.0.*")}


@pytest.mark.parametrize("name", slow_but(["ZeRO-2", "ZeRO-3"], list(STATES)))
def test_two_ranks_equal_plain_pytorch(name: str, directory: Path) -> None:
    path = _save(directory, "llama")
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12), **WEIGHT_DECAY), Causal)
    sharded, _ = on_ranks(
        2, steps, plan_of(path, 2, batch=_batch(2, 2), **STATES[name], **WEIGHT_DECAY), Causal
    )
    _check(plain, sharded, 1e-5)
    for key, value in plain["tensors"].items():
        torch.testing.assert_close(sharded["tensors"][key], value, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("changes", [SGD, FROZEN], ids=["sgd", "frozen"])
def test_other_optimizers_and_frozen_parameters(stage: int, changes: dict[str, Any], directory: Path) -> None:
    path = _save(directory, "llama")
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12), **changes), Causal)
    sharded, *_ = on_ranks(
        3, steps, plan_of(path, 3, batch=_batch(3, 2), **deepspeed(stage, **changes)), Causal
    )
    _check(plain, sharded, 1e-5)
    for key, value in plain["tensors"].items():
        torch.testing.assert_close(sharded["tensors"][key], value, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fsdp_with_masters_that_were_not_rounded(stage: int, directory: Path) -> None:
    path = _save(directory, "llama")
    fsdp = _ran(plan_of(path, 2, precision="bf16", batch=_batch(2, 6)), Causal)
    zero, _ = on_ranks(
        2, steps, plan_of(path, 2, precision="bf16", batch=_batch(2, 6), **deepspeed(stage)), Causal
    )
    torch.testing.assert_close(torch.tensor(zero["curve"]), torch.tensor(fsdp["curve"]), rtol=1e-2, atol=0)
    for name, value in fsdp["tensors"].items():
        assert zero["tensors"][name].dtype == torch.float32
        torch.testing.assert_close(zero["tensors"][name], value, rtol=0, atol=2e-3)
    # Masters made from bf16 would be off by one part in 512.
    name = "model.model.norm.weight"
    assert not torch.equal(zero["tensors"][name], zero["tensors"][name].bfloat16().float())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with parameters large enough to go to files: DeepSpeed keeps pieces below 1 MiB in memory."""
    return _save(
        tmp_path_factory.mktemp("wide"),
        "llama",
        hidden_size=192,
        intermediate_size=768,
        vocab_size=12_000,
        head_dim=48,
    )


NO_LIBAIO = not Path("/usr/include/libaio.h").exists()


@pytest.mark.slow
@pytest.mark.very_slow  # compiling takes ten minutes of processor time
@pytest.mark.timeout(1800)  # the operator is compiled here where no earlier run has done so
@pytest.mark.skipif(
    NO_LIBAIO, reason="libaio-dev is not installed, from which DeepSpeed compiles its file operator"
)
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_state_on_files_changes_no_number(offload: str, wide: Path, tmp_path: Path) -> None:
    zero = deepspeed(3, **WEIGHT_DECAY)
    files = deepspeed(3, offload=offload, offload_to=str(tmp_path), **WEIGHT_DECAY)
    files["zero"] |= {"sub_group_size": 600_000, "max_live_parameters": 4_000_000}
    files["zero"]["prefetch_bucket_size"] = 10_000 if offload == "optimizer" else 0
    plan = plan_of(wide, 2, batch=_batch(2, 2), **files)
    said: list[tuple[int, int]] = []
    build_operators(plan, lambda done, total: said.append((done, total)))
    assert said == [(0, 2), (1, 2), (2, 2)]
    kept, _ = on_ranks(2, steps, plan_of(wide, 2, batch=_batch(2, 2), **zero), Causal)
    swapped, _ = on_ranks(2, steps, plan, Causal)
    assert list(tmp_path.glob("**/exp_avg-*.swp")), "nothing was swapped, so that this shows nothing"
    assert [loss for loss, _ in swapped["curve"]] == [loss for loss, _ in kept["curve"]]
    _check(kept, swapped, 1e-5)
    for name, value in kept["tensors"].items():
        assert torch.equal(swapped["tensors"][name], value), name


def test_an_operator_that_cannot_be_built_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler is faked away at the border: a builder that fails as one without a compiler does."""
    from deepspeed.accelerator import get_accelerator

    class Broken:
        def load(self, verbose: bool) -> None:
            raise RuntimeError("Error building extension 'pin_memory'\nlong output")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(get_accelerator(), "get_op_builder", lambda name: Broken)
    stale = tmp_path / "extensions" / "async_io" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with pytest.raises(
        ConfigurationError,
        match="PinMemory operator could not be built: Error building extension 'pin_memory'; write cpu",
    ):
        build_operators(
            plan_of(tmp_path, 1, **deepspeed(3, offload="optimizer", offload_to=str(tmp_path))),
            lambda done, total: None,
        )
    assert not stale.exists(), "what a killed build leaves would be waited for"


def test_a_parameter_that_is_a_single_number_is_refused() -> None:
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(()))
    model.tie_weights = lambda: None  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="a single number"):
        cut_rows(model, None)  # type: ignore[arg-type]


def sized(model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> Plan:
    return plan_for(model, data, world_size, 12, batch=batch_of(world_size, 12 // world_size), **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "freeze",
    [pytest.param((), marks=pytest.mark.very_slow), ("model.layers.0.*",)],
    ids=["all", "partly frozen"],
)
def test_the_matrix_of_resumes(
    freeze: tuple[str, ...], tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """FSDP on 2 ranks, ZeRO-3 on 3, ZeRO-2 on 1, ZeRO-1 on 2, FSDP on 4: the embeddings are tied, and 131
    rows divide by none of them."""
    keys = {"model__freeze": freeze}
    whole = new_run(tmp_path / "whole", sized(model, data, 2, **keys))
    finish(whole, 2)
    run = new_run(tmp_path / "run", sized(model, data, 2, **keys))
    finish(run, 2, stop_at=2)
    go_on(run, sized(model, data, 3, **deepspeed(3), **keys), tmp_path / "loaded.pt", 4)
    go_on(run, sized(model, data, 1, **deepspeed(2), **keys), tmp_path / "loaded.pt", 6)
    go_on(run, sized(model, data, 2, **deepspeed(1), **keys), tmp_path / "loaded.pt", 8)
    go_on(run, sized(model, data, 4, **keys), tmp_path / "loaded.pt", None)
    assert len(named(run, "resumed")) == 4 and len(curve(run)) == 12
    compare(run, whole, 1e-3)
    gradient_norms = [[record["grad_norm"] for record in curve(one).values()] for one in (run, whole)]
    torch.testing.assert_close(
        torch.tensor(gradient_norms[0]), torch.tensor(gradient_norms[1]), rtol=1e-3, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.very_slow), 2, 3])
def test_resumed_under_one_plan_it_is_bit_equal(
    stage: int, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    runs = [
        new_run(tmp_path / name, sized(model, data, 2, **deepspeed(stage))) for name in ("whole", "stopped")
    ]
    finish(runs[0], 2)
    finish(runs[1], 2, stop_at=5)
    finish(runs[1], 2)
    assert curve(runs[0]) == curve(runs[1])
    assert_equal(state(runs[0]), state(runs[1]))


@pytest.mark.slow
def test_pytorch_reads_what_zero_3_saved(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """Without launcher and without DeepSpeed; and an export holds the same tensors."""
    run = new_run(tmp_path / "run", sized(model, data, 2, **deepspeed(3)))
    finish(run, 2, stop_at=3)
    file = tmp_path / "whole.pt"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.checkpoint.format_utils",
        "dcp_to_torch",
        str(run.checkpoint(3)),
        str(file),
    ]
    subprocess.run(command, check=True, capture_output=True)
    read = torch.load(file, weights_only=True)
    assert_equal(dict(sorted(read.items())), dict(sorted(state(run).items())))
    export(run, tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(read[f"model.{name}"], value), name


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """On all ranks, at every stage, and the steps after it are what they are under FSDP."""
    runs = {}
    for name, keys in {
        "fsdp": {},
        "zero1": deepspeed(1),
        "zero3": deepspeed(3),
        "offloaded": deepspeed(3, offload="optimizer"),
    }.items():
        runs[name] = new_run(tmp_path / name, sized(model, data, 2, **keys))
        finish(runs[name], 2, poisoned, stop_at=6)
    for name, run in runs.items():
        assert [record["step"] for record in named(run, "skipped")] == [3], name
        ours, theirs = (
            [record["loss"] for record in list(curve(one).values())[3:]] for one in (run, runs["fsdp"])
        )
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def poisoned(rank: int, stop: Any) -> None:
    """A hook: the gradients of rank 1 are not finite in the third step."""
    from launcher.training.trainer import Trainer

    accumulate = Trainer._accumulate

    def with_poison(self: Trainer, batch: Any) -> torch.Tensor:
        if rank == 1 and self.state.step == 2:
            micro_step = self.engine.micro_step
            self.engine.micro_step = lambda batch, factor, last: micro_step(batch, float("nan"), last)  # type: ignore[method-assign]
            try:
                return accumulate(self, batch)
            finally:
                self.engine.micro_step = micro_step  # type: ignore[method-assign]
        return accumulate(self, batch)

    Trainer._accumulate = with_poison  # type: ignore[method-assign]


def linear_layers(plan: Plan) -> set[str]:
    """By which forward pass the linear layers of a rank's model compute."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = build(plan, Causal, config, deepspeed_config(plan))  # type: ignore[arg-type]
    return {module.forward.__module__ for module in engine.model.modules() if type(module) is torch.nn.Linear}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_only_the_third_stage_has_linear_layers_let_go_of_their_matrix(stage: int, directory: Path) -> None:
    """The numbers are the same either way, so that nothing else would show it."""
    (found,) = on_ranks(
        1, linear_layers, plan_of(_save(directory, "llama"), 1, batch=_batch(1, 12), **deepspeed(stage))
    )
    theirs = torch.nn.Linear.forward.__module__
    # DeepSpeed wraps what is called in functions of its own; which of ours lies below decides.
    assert (theirs in found) is (stage == 2) and ("launcher.training.engines.linear" in found) is (stage == 3)


def test_hooks_that_are_made_while_deepspeeds_are_away_stay() -> None:
    """As transformers makes them in a model's first pass."""
    model, theirs, own = nn.Linear(1, 1), lambda *_: None, lambda *_: None
    theirs.__module__ = "deepspeed.runtime.zero"
    model.register_forward_hook(theirs)
    with without_hooks(model):
        assert not model._forward_hooks
        model.register_forward_hook(own)
    assert list(model._forward_hooks.values()) == [theirs, own]
