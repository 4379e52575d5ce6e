"""The engine gives the numbers of plain PyTorch on any number of ranks, for every family, precision and
memory mode."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.planner.speed.collectives import _Times
from launcher.render.deepspeed import config as deepspeed_config
from launcher.tasks.label_losses import label_loss
from launcher.tasks.task import Output
from launcher.training import heads
from launcher.training.engines import build, fsdp
from launcher.training.model import attention
from launcher.training.model.loading import repeated_layers
from tests.tiers import slow_but
from tests.training.batches import batch_of_samples as packed_batch
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks
from tests.training.tiny import ENCODERS, FAMILIES, MIXTURES, config_of, model_of
from tests.training.wholes import whole

pytestmark = pytest.mark.distributed


class Causal:
    auto_class = AutoModelForCausalLM
    companions: ClassVar[dict[str, Any]] = {}
    loss = staticmethod(heads.causal_lm)


class Classifying:
    auto_class = AutoModelForSequenceClassification
    companions: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def loss(model: Any, batch: Any) -> Output:
        return label_loss(model, batch, "single-label")


def steps(plan: Plan, task: Any, num_steps: int = 3) -> dict[str, Any]:
    """A few optimizer steps of four samples, this rank's share of them; what came of it, gathered whole."""
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine = build(plan, task, config, deepspeed_config(plan) if plan.engine == "deepspeed" else {})
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    curve = []
    for step in range(num_steps):
        samples = _samples(step)
        mine = samples[rank * (len(samples) // size) : (rank + 1) * (len(samples) // size)]
        micro = plan.batch.micro_batch_size
        pieces = [mine[i : i + micro] for i in range(0, len(mine), micro)]
        supervised = sum(len(sample) - 1 for sample in samples) if task is Causal else len(samples)
        loss = torch.zeros((), dtype=torch.float64)
        for index, piece in enumerate(pieces):
            batch = packed_batch(piece) if task is Causal else _padded(piece)
            loss += engine.micro_step(batch, 1 / supervised, index == len(pieces) - 1).loss_sum.detach()
        sums = torch.stack([loss / supervised, engine.squared_gradient_norm()])
        torch.distributed.all_reduce(sums)
        curve.append([float(sums[0]), float(sums[1].sqrt())])
        engine.optimizer_step(1e-3, 1.0)
    tensors = {name: whole(value) for name, value in engine.state_dict().items()}
    return {
        "curve": curve,
        "tensors": tensors,
        "layers": sum(hasattr(layer, "unshard") for layer in repeated_layers(engine.model)),
    }


def _samples(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        torch.randint(3, 131, (length,), generator=generator)
        for length in (9, 30, 4, 17, 25, 6, 12, 20, 3, 8, 15, 11)
    ]


def _padded(samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    length = max(len(sample) for sample in samples)
    ids = torch.stack([torch.nn.functional.pad(sample, (0, length - len(sample))) for sample in samples])
    labels = torch.tensor([int(sample[0]) % 3 for sample in samples])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": labels,
        "weights": torch.ones(len(samples)),
    }


@functools.cache
def _ran(plan: Plan, task: Any) -> dict[str, Any]:
    """Return what rank 0 of the plan's gives, worked out once for all tests that compare with it."""
    return dict(on_ranks(plan.mesh.world_size, steps, plan, task)[0])


def _check(plain: dict[str, Any], sharded: dict[str, Any], tolerance: float) -> None:
    torch.testing.assert_close(
        torch.tensor(sharded["curve"]), torch.tensor(plain["curve"]), rtol=tolerance, atol=0
    )
    assert sharded["tensors"].keys() == plain["tensors"].keys()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _save(directory: Path, family: str, **changes: Any) -> Path:
    path = directory / family
    if not path.exists():
        model_of(family, **changes).save_pretrained(path)
    return path


def _batch(world_size: int, micro: int) -> dict[str, int]:
    return {
        "global_batch_size": 12,
        "micro_batch_size": micro,
        "accumulation_steps": 12 // micro // world_size,
        "data_parallel_size": world_size,
    }


@pytest.mark.parametrize(
    "family",
    slow_but(
        ("llama", "gpt2", "mixtral"),
        sorted(FAMILIES | MIXTURES),
        very_slow=(FAMILIES | MIXTURES).keys() - {"llama", "gpt2", "mixtral", "granite", "qwen3"},
    ),
)
def test_two_ranks_equal_one(family: str, directory: Path) -> None:
    path = _save(
        directory,
        family,
        **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}),
    )
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12)), Causal)
    sharded, _ = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 2)), Causal)
    assert plain["layers"] == 0 and sharded["layers"] == 3
    _check(plain, sharded, 1e-5)


@pytest.mark.parametrize(("world_size", "micro"), slow_but([(2, 1)], [(2, 1), (3, 2), (4, 3), (1, 4)]))
def test_any_cut_of_the_batch_gives_the_same_numbers(world_size: int, micro: int, directory: Path) -> None:
    path = _save(directory, "llama")
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12)), Causal)
    sharded = on_ranks(world_size, steps, plan_of(path, world_size, batch=_batch(world_size, micro)), Causal)
    for result in sharded:
        _check(plain, result, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"dp_replicate": 2, "dp_shard": 2},
        {"dp_replicate": 4, "dp_shard": 1},
        {"reshard_after_forward": False},
    ],
)
def test_hybrid_and_kept_parameters_equal_full_sharding(mesh: dict[str, Any], directory: Path) -> None:
    path = _save(directory, "llama")
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12)), Causal)
    changes = {f"mesh__{key}": value for key, value in mesh.items()}
    result, *_ = on_ranks(4, steps, plan_of(path, 4, batch=_batch(4, 3), **changes), Causal)
    _check(plain, result, 1e-5)


def gatherings(plan: Plan, defers: bool) -> list[int]:
    """How often parameters are gathered in each of two steps."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    _send_gradients(defers)
    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    engine, original = build(plan, Causal(), config, {}), groups.foreach_all_gather  # type: ignore[arg-type]
    found: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        found[-1] += 1
        return original(*arguments, **options)

    groups.foreach_all_gather = counted
    for step in range(2):
        found.append(0)
        for index in range(plan.batch.accumulation_steps):
            engine.micro_step(
                packed_batch(_samples(step)[:2]), 1.0, index == plan.batch.accumulation_steps - 1
            )
        engine.optimizer_step(1e-3, 1.0)
    return found


def _send_gradients(defers: bool) -> None:
    """Once a step, or of every micro-batch, as FSDP does with a large model's."""
    fsdp.DEFERRED_GRADIENT_BYTES = 4 << 30 if defers else 0


def steps_that_send(plan: Plan, defers: bool) -> dict[str, Any]:
    _send_gradients(defers)
    return steps(plan, Causal)


@pytest.mark.slow
@pytest.mark.parametrize("defers", [True, False])
@pytest.mark.parametrize(("sharding", "times"), [("full", 3 * 2 * 3 + 1), ("gradients", 3 + 1)])
def test_what_is_whole_between_the_passes_is_gathered_once_a_step(
    sharding: str, times: int, defers: bool, directory: Path
) -> None:
    """Of three layers, let go of twice in each of three passes or kept; the planner counts the same, and the
    numbers are one rank's."""
    path = _save(directory, "llama")
    changes = {"sharding": sharding, "mesh__reshard_after_forward": sharding == "full"}
    plan = plan_of(path, 2, batch=_batch(2, 2), **changes)
    assert on_ranks(2, gatherings, plan, defers)[0] == [times, times]
    foreseen = _Times.of(plan, 1)
    assert (foreseen.layer + foreseen.layer_back) * 3 + foreseen.root == times
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12)), Causal)
    _check(plain, on_ranks(2, steps_that_send, plan, defers)[0], 1e-5)


def additions_of_copies(plan: Plan, defers: bool) -> tuple[list[int], dict[str, Any]]:
    """How often copies add up gradients in each of two steps, and what the steps of the others tests give."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    _send_gradients(defers)
    original, counts = collectives.dist.all_reduce, [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        counts[0] += 1
        return original(*arguments, **options)

    results = steps(plan, Causal)  # before they are counted: the norm is added up by the same function
    engine = build(plan, Causal(), AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    ), {})  # type: ignore[arg-type]  # fmt: skip
    collectives.dist.all_reduce = counted
    seen = []
    for step in range(2):
        counts[0] = 0
        for index in range(plan.batch.accumulation_steps):
            engine.micro_step(
                packed_batch(_samples(step)[:2]), 1.0, index == plan.batch.accumulation_steps - 1
            )
        seen.append(counts[0])
        engine.zero_grad()
    if not defers:
        # As where a part has no gradient in the last pass: sums of the passes before it are left.
        engine.micro_step(packed_batch(_samples(0)[:2]), 1.0, False)
        with pytest.raises(ConfigurationError, match=r"parallel\.replicate"):
            engine._refuse_left_over_sums()  # type: ignore[attr-defined]
    return seen, results


@pytest.mark.slow
@pytest.mark.parametrize("defers", [True, False])
def test_copies_add_up_their_gradients_once_a_step(defers: bool, directory: Path) -> None:
    """Of three layers and the rest, over three passes; the numbers are one rank's."""
    path = _save(directory, "llama")
    plan = plan_of(path, 4, batch=_batch(4, 1), mesh__dp_replicate=2, mesh__dp_shard=2)
    assert plan.batch.accumulation_steps == 3
    seen, results = on_ranks(4, additions_of_copies, plan, defers)[0]
    assert seen == [4, 4]
    _check(_ran(plan_of(path, 1, batch=_batch(1, 12)), Causal), results, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_offloaded_parameters_change_no_number(world_size: int, directory: Path) -> None:
    """On the CPU there is nowhere to move them to; what is held here is that the engine takes them through
    FSDP's own policy."""
    path = _save(directory, "llama")
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12)), Causal)
    result, *_ = on_ranks(
        world_size,
        steps,
        plan_of(path, world_size, batch=_batch(world_size, 3), offload="parameters"),
        Causal,
    )
    _check(plain, result, 1e-5)
    assert result["layers"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing_changes_no_number(mode: str, world_size: int, directory: Path) -> None:
    path = _save(directory, "llama")
    plan = plan_of(path, world_size, batch=_batch(world_size, 3))
    kept = _ran(plan, Causal)
    recomputed, *_ = on_ranks(
        world_size, steps, plan.model_copy(update={"activation_checkpointing": mode}), Causal
    )
    assert recomputed["curve"] == kept["curve"]
    for name, value in kept["tensors"].items():
        assert torch.equal(recomputed["tensors"][name], value), name


@pytest.mark.parametrize("precision", slow_but(["bf16"], ["bf16", "fp16"]))
def test_half_precision_follows_fp32_and_keeps_fp32_states(precision: str, directory: Path) -> None:
    path = _save(directory, "llama")
    full = _ran(plan_of(path, 2, batch=_batch(2, 6)), Causal)
    for world_size in (1, 2):
        half, *_ = on_ranks(
            world_size,
            steps,
            plan_of(path, world_size, precision=precision, batch=_batch(world_size, 6)),
            Causal,
        )
        torch.testing.assert_close(
            torch.tensor(half["curve"]), torch.tensor(full["curve"]), rtol=2e-2, atol=0
        )
        assert half["curve"] != full["curve"]
        assert {value.dtype for value in half["tensors"].values()} == {torch.float32}


@pytest.mark.parametrize("family", slow_but(["bert"], sorted(ENCODERS)))
def test_classification_with_a_new_head(family: str, directory: Path) -> None:
    """The new head has the same values on any number of ranks, and the repeated layers are units in every
    encoder."""
    path = directory / f"{family}-encoder"
    changes = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    }
    model_of(family, "AutoModel").save_pretrained(path)
    config_of(family, num_labels=3, **changes).save_pretrained(path)
    options = {"task": "sequence-classification", "attention": "sdpa"}
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12), **options), Classifying)
    for world_size in (2,) if family != "bert" else (2, 3):
        sharded, *_ = on_ranks(
            world_size, steps, plan_of(path, world_size, batch=_batch(world_size, 2), **options), Classifying
        )
        assert sharded["layers"] == 3
        _check(plain, sharded, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_other_optimizers(optimizer: str, directory: Path) -> None:
    path = _save(directory, "llama")
    options = {"training": {"optimizer": optimizer, "max_steps": 4, "weight_decay": 0.1}}
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12), **options), Causal)
    sharded, _ = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 6), **options), Causal)
    _check(plain, sharded, 1e-5)
    wanted = "exp_avg" if optimizer == "adam" else "momentum_buffer"
    assert any(name.endswith(wanted) for name in sharded["tensors"])


def test_frozen_parameters_stay(directory: Path) -> None:
    path = _save(directory, "llama")
    plan = plan_of(path, 2, batch=_batch(2, 6), model__freeze=("model.embed_tokens.*", "model.layers.0.*"))
    result, _ = on_ranks(2, steps, plan, Causal)
    before = {
        f"model.{name}": value
        for name, value in AutoModelForCausalLM.from_pretrained(path).named_parameters()
    }
    for name, value in before.items():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(result["tensors"][name], value) == frozen, name
        assert (f"optimizer.{name.removeprefix('model.')}.exp_avg" in result["tensors"]) != frozen


def test_random_weights_do_not_depend_on_the_ranks(directory: Path) -> None:
    path = directory / "config-only"
    config_of("llama").save_pretrained(path)
    options = {"model__weights": "random", "training": {"max_steps": 4, "seed": 5}}
    plain = _ran(plan_of(path, 1, batch=_batch(1, 12), **options), Causal)
    sharded, *_ = on_ranks(3, steps, plan_of(path, 3, batch=_batch(3, 2), **options), Causal)
    _check(plain, sharded, 1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__freeze": ("nothing.*",)}, "matches no parameter"),
        ({"model__freeze": ("*",)}, "nothing is left to train"),
        ({"attention": "flash_attention_2"}, "FlashAttention2"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], text: str, directory: Path) -> None:
    path = _save(directory, "llama")
    with pytest.raises(AssertionError, match=f"ConfigurationError.*{text}"):
        on_ranks(1, steps, plan_of(path, 1, **changes), Causal)


def test_a_model_without_repeated_layers_is_refused() -> None:
    class Flat(torch.nn.Module):
        _no_split_modules = None
        name_or_path = "flat"

    with pytest.raises(ConfigurationError, match="no repeated layers"):
        repeated_layers(Flat())  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.very_slow
def test_compiled_layers_equal_eager_ones(directory: Path) -> None:
    path = _save(directory, "llama")
    plan = plan_of(path, 2, batch=_batch(2, 3))
    model = plan.model.model_copy(update={"compile": True})
    eager, _ = on_ranks(2, steps, plan, Causal)
    compiled, _ = on_ranks(2, steps, plan.model_copy(update={"model": model}), Causal)
    _check(eager, compiled, 1e-5)
    assert compiled["layers"] == 3
