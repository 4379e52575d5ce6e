"""Adam's moments in 8 bits: as torchao has them, on any number of ranks the same, resumed and resharded."""

from __future__ import annotations

import hashlib
import importlib
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.errors import ConfigurationError
from launcher.job.schema import Training
from launcher.planner.limits import in_bytes
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.model.model_config import read_config
from launcher.training import byte_moments
from launcher.training import optimizer as optimizers
from launcher.training.byte_moments import decoded, encode, levels
from launcher.training.checkpoint.foreign.names import expected
from tests.training.given_gradients import stepped, stepped_whole
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    state,
)
from tests.training.test_engine import Causal, _batch, _save, steps
from tests.training.test_resume import compare, go_on

CPU = torch.device("cpu")
BYTES: dict[str, Any] = {"moments": "8bit", "max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.1}
LARGER: dict[str, Any] = {"intermediate_size": 320}
"""Of the tiny llama: matrices that are large enough, with rows of a block and a quarter."""
SHAPES = [(20, 512), (31, 300), (7, 9, 70), (4096, 2), (9, 1200), (12, 7), (5000,)]
"""The last two stay in fp32."""


def values(seed: int) -> list[torch.Tensor]:
    """Tensors of each shape, over eight decades; the gradients of some rows are nothing."""
    generator = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(shape, generator=generator) * 10 ** (-8 * torch.rand(shape, generator=generator))
        for shape in SHAPES
    ]
    made[0][3:9] = 0
    return made


def make(group: dict[str, Any], kind: str = "adamw") -> byte_moments.AdamOfByteMoments:
    training = Training(optimizer=kind, moments="8bit", betas=(0.8, 0.95), epsilon=1e-6)  # type: ignore[arg-type]
    optimizer = byte_moments.AdamOfByteMoments([group], training)
    optimizers.make_states(optimizer, training)
    return optimizer


def group_of(parameters: list[nn.Parameter]) -> dict[str, Any]:
    return {"params": parameters, "weight_decay": 0.1, "kind": "adamw", "stage": 0, "scale": 1.0}


@pytest.mark.parametrize("signed", [True, False])
def test_an_element_is_the_nearest_of_its_levels(signed: bool) -> None:
    """By a search of all of them. Only what was 0 becomes 0 of a second moment; the largest of a block is
    exact."""
    table, wide = (
        levels(signed, CPU),
        torch.cat([one.flatten() for one in values(0)[:5]])[:27_648].view(48, 576),
    )
    wide = wide if signed else wide.square()
    codes, scales = torch.empty(wide.shape, dtype=torch.uint8), torch.empty(48, 3)
    encode(wide.clone(), codes, scales, table)
    for begin, scale in zip((0, 256, 512), scales.unbind(1), strict=True):
        block = wide[:, begin : begin + 256]
        assert torch.equal(scale, block.abs().amax(1))
        shares = block / scale.clamp(min=1e-30)[:, None]
        distances = (shares[..., None] - table.values).abs()
        if not signed:
            distances[..., 0][shares > 0] = torch.inf
        torch.testing.assert_close(
            table.values[codes[:, begin : begin + 256].int()].sub(shares).abs(),
            distances.amin(-1),
            rtol=0,
            atol=1e-7,
        )
    again = decoded(codes, scales, table)
    assert (again == 0).logical_or(wide != 0).all() if not signed else (again == 0).any()
    largest = wide.argmax(1, keepdim=True)
    if not signed:
        assert torch.equal(again.gather(1, largest), wide.gather(1, largest))
    assert len(table.values.unique()) == 256


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_a_step_is_pytorchs_own_with_moments_that_are_quantised_after_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 512 numbers: rows, parts of rows, and all of a small tensor."""
    monkeypatch.setattr(byte_moments, "WIDENED_BYTES", 512)
    ours = [nn.Parameter(value) for value in values(0)]
    optimizer = make(group_of(ours), kind)
    theirs = [nn.Parameter(value) for value in values(0)]
    plain = (torch.optim.AdamW if kind == "adamw" else torch.optim.Adam)(
        theirs, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True
    )
    optimizer.param_groups[0]["lr"] = 0.02
    for step in range(3):
        for one, other, gradient in zip(ours, theirs, values(1 + step), strict=True):
            one.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        plain.step()
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            kept, wanted = optimizer.state[one], plain.state[other]
            assert int(kept["step"]) == step + 1 == int(wanted["step"])
            assert ("exp_avg_scale" in kept) == in_bytes(one.shape) == (number < 5)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                if f"{key}_scale" not in kept:
                    torch.testing.assert_close(kept[key], wanted[key], rtol=1e-6, atol=1e-9)
                    continue
                rows, table = wanted[key].flatten(1), levels(signed, CPU)
                codes, scales = (
                    torch.empty(rows.shape, dtype=torch.uint8),
                    torch.empty_like(kept[f"{key}_scale"]),
                )
                encode(rows.clone(), codes, scales, table)
                torch.testing.assert_close(scales, kept[f"{key}_scale"], rtol=1e-6, atol=0)
                assert (codes != kept[key].flatten(1)).float().mean() < 1e-3, "but at a border by rounding"
                wanted[key].copy_(decoded(kept[key].flatten(1), kept[f"{key}_scale"], table).view(one.shape))


@pytest.mark.parametrize(("signed", "digest"), [(True, "000e2645b0095662"), (False, "6955ece448291892")])
def test_codes_are_torchaos(signed: bool, digest: str) -> None:
    """Of 48,960 magnitudes from 2**-24 to 1, and as many negative ones: the SHA-256 of what torchao 0.18's
    `quantize_8bit_with_qmap` gave, with 0 lifted to 1 where there is no sign."""
    bits = torch.arange(0x33800123, 0x3F800000, 1 << 12, dtype=torch.int32)[: 192 * 255]
    magnitudes, ones = bits.view(torch.float32).view(192, 255), torch.ones(192, 1)
    rows = torch.cat([ones, magnitudes], 1)
    if signed:
        rows = torch.cat([rows, torch.cat([ones, -magnitudes], 1)])
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    encode(rows, codes, torch.empty(len(rows), 1), levels(signed, CPU))
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16] == digest


def test_it_steps_as_torchaos_own_where_blocks_are_the_same() -> None:
    """Rows of whole blocks; whatever is 0 there of a second moment and was not has the lowest level here."""
    theirs_ = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    quantised = importlib.import_module("torchao.optim.subclass_8bit")
    for signed, theirs in ((True, quantised.get_qmap_signed()), (False, quantised.get_qmap_unsigned())):
        assert torch.equal(levels(signed, CPU).values, torch.tensor(theirs))
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(64, 512, generator=generator), torch.randn(9, generator=generator)]
    ours, others = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizer = make(group_of(ours))
    optimizer.param_groups[0]["lr"] = 0.01
    other = theirs_.AdamW8bit(others, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(10):
        for one, two in zip(ours, others, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            two.grad = one.grad.clone()
        optimizer.step()
        other.step()
        codes, wanted = optimizer.state[ours[0]], other.state[others[0]]
        assert (codes["exp_avg"] != wanted["exp_avg"].codes).sum() <= 3
        lifted = wanted["exp_avg_sq"].codes.clamp(min=1)
        assert (codes["exp_avg_sq"] != lifted).sum() <= 3
    for one, two in zip(ours, others, strict=True):
        apart = (one - two).detach().abs()
        assert float(apart.max()) < 1e-3 and float(apart.mean()) < 1e-6


def test_weights_whose_gradients_stop_do_not_run_away() -> None:
    """As those of an expert without tokens. Rounded to 0, second moments let a weight move by 190 here."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(16, 256, generator=generator) * 10 ** (
        -5 * torch.rand(16, 256, generator=generator)
    )
    furthest = []
    for moments in ("fp32", "8bit"):
        weights = nn.Linear(256, 16, bias=False)
        before = weights.weight.detach().clone()
        optimizer = optimizers.build(weights, Training(moments=moments, learning_rate=1e-3))  # type: ignore[arg-type]
        for step in range(30):
            weights.weight.grad = gradient.clone() if step == 0 else torch.zeros_like(gradient)
            optimizer.step()
        furthest.append(float((weights.weight.detach() - before).abs().max()))
    assert furthest[1] < 1.5 * furthest[0] < 0.01


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "copies"),
    [(3, 1), pytest.param(4, 2, marks=pytest.mark.slow)],
    ids=["three", "two copies"],
)
def test_its_blocks_are_the_same_on_any_number_of_ranks(world_size: int, copies: int) -> None:
    """So each rank has the weights of one, but where PyTorch's step rounds the end of a shard otherwise."""
    wanted = stepped_whole(make(group_of([nn.Parameter(value) for value in values(0)])), values)
    for ours in on_ranks(world_size, stepped, make, "adamw", values, copies):
        for one, other in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("family", "copies", "num_bytes"),
    [("llama", 1, 10), ("llama", 2, 10), ("mixtral", 1, 8)],
    ids=["cut over two", "two copies", "experts, five over two"],
)
def test_two_ranks_learn_what_one_does(family: str, copies: int, num_bytes: int, tmp_path: Path) -> None:
    """`num_bytes` parameters have moments in 8 bits: of the vocabulary, and of feed-forward layers or experts."""
    path = _save(tmp_path, family, **(LARGER if family == "llama" else {}))
    mesh: dict[str, Any] = {"mesh__dp_replicate": copies, "mesh__dp_shard": 2 // copies}
    one, *_ = on_ranks(1, steps, plan_of(path, 1, batch=_batch(1, 12), training=BYTES), Causal)
    two, other = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 2), training=BYTES, **mesh), Causal)
    torch.testing.assert_close(torch.tensor(two["curve"]), torch.tensor(one["curve"]), rtol=1e-5, atol=0)
    assert one["curve"][-1] != one["curve"][0]
    narrow = 0
    for key, value in one["tensors"].items():
        assert torch.equal(two["tensors"][key], other["tensors"][key]), key
        if ".exp_avg" not in key:
            torch.testing.assert_close(two["tensors"][key], value, rtol=1e-3, atol=2e-5)
            continue
        name = key.removeprefix("optimizer.").rpartition(".")[0]
        shape = one["tensors"][f"model.{name}"].shape
        if key.endswith("_scale"):
            assert [*value.shape] == [shape[0], -(-prod(shape[1:]) // 256)]
            torch.testing.assert_close(two["tensors"][key], value, rtol=1e-3, atol=1e-9)
        else:
            narrow += value.dtype == torch.uint8
            assert value.shape == shape and value.dtype == (torch.uint8 if in_bytes(shape) else torch.float32)
            assert (two["tensors"][key] != value).float().mean() < 0.01 or value.dtype == torch.float32
    assert narrow == 2 * num_bytes


@pytest.mark.slow
@pytest.mark.distributed
def test_resumed_it_is_bit_equal_and_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model", **LARGER), causal_data(tmp_path / "data")
    plan = plan_for(model, data, 2, 6, batch=batch_of(2, 6), training=BYTES)
    whole, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    codes = "optimizer.model.layers.0.mlp.down_proj.weight.exp_avg_sq"
    assert state(whole)[codes].dtype == torch.uint8 and state(whole)[f"{codes}_scale"].shape == (48, 2)
    formulas = formulas_of(plan, read_config(str(model)) or {})
    assert formulas is not None
    num_bytes = sum(tensor.nbytes for name, tensor in state(whole).items() if name != "optimizer.step")
    assert num_bytes == Estimator(plan, formulas).checkpoint_bytes
    finish(moved, 2, stop_at=3)
    three = plan_for(model, data, 3, 6, batch=batch_of(3, 4), training=BYTES)
    go_on(moved, three, tmp_path / "loaded.pt")
    compare(moved, whole, 1e-5)


def test_moments_of_another_system_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.moments.*8bit.*write fp32 or bf16"):
        expected(plan_of(tmp_path, 1, training=BYTES), None)  # type: ignore[arg-type]
