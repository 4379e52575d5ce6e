"""Messages through shared memory bring what gloo's bring, to the bit, and only where they can."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed import ReduceOp

from launcher.training import gradient_messages, shared_messages
from tests.training.ranks import on_ranks

pytestmark = pytest.mark.distributed
COUNTS = (70_000, 2 * shared_messages.PIECE_BYTES // 4 + 12)
"""Elements of a rank's part: in one piece and a bit of another; in several, with a rest."""


def _both_ways(message: Any) -> tuple[Any, Any, bool]:
    """What it brings through shared memory, and through gloo; whether the former was used."""
    shared, used = message(), bool(_of_this_process())
    least, shared_messages.SHARED_MESSAGE_BYTES = shared_messages.SHARED_MESSAGE_BYTES, 1 << 60
    through_gloo = message()
    shared_messages.SHARED_MESSAGE_BYTES = least
    return shared, through_gloo, used


def _of_this_process() -> list[shared_messages.Memory]:
    return [one for one in shared_messages._memories.values() if one is not None]


def _gathered(dtype: torch.dtype, count: int) -> bool:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    part = torch.arange(count).add(rank * 1000).to(dtype)

    def message() -> torch.Tensor:
        whole = torch.zeros(size * count, dtype=dtype)
        distributed.all_gather_single(whole, part)
        return whole

    def in_place() -> torch.Tensor:
        """As FSDP does it: a rank's part lies in the place where it belongs."""
        whole = torch.zeros(size * count, dtype=dtype)
        whole[rank * count :][:count] = part
        work = distributed.all_gather_single(whole, whole[rank * count :][:count], async_op=True)
        assert work.wait()
        return whole

    results = [*_both_ways(message), *_both_ways(in_place)]
    return results[2] and all(torch.equal(results[0], results[at]) for at in (1, 3, 4))


def _scattered(dtype: torch.dtype, count: int, mean: bool) -> tuple[bool, torch.Tensor, torch.Tensor]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    whole = torch.randn(size * count, generator=torch.Generator().manual_seed(rank)).to(dtype)
    kept = whole.clone()

    def message() -> torch.Tensor:
        output = torch.zeros(count, dtype=dtype)
        distributed.reduce_scatter_single(output, whole, op=ReduceOp.AVG if mean else ReduceOp.SUM)
        return output

    shared, through_gloo, used = _both_ways(message)
    return used and torch.equal(whole, kept), shared, through_gloo


def _all_gathered() -> list[bool]:
    return [
        _gathered(dtype, count)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
        for count in COUNTS[:]
    ]


def _all_scattered() -> list[tuple[bool, torch.Tensor, torch.Tensor]]:
    return [
        _scattered(dtype, count, mean)
        for dtype, mean in ((torch.float32, True), (torch.bfloat16, False))
        for count in COUNTS
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_are_as_gloos(world_size: int) -> None:
    assert all(map(all, on_ranks(world_size, _all_gathered)))
    for results in on_ranks(world_size, _all_scattered):
        for used, shared, through_gloo in results:
            assert used
            # Of two numbers the sum has one order.
            tolerance = 0.0 if world_size == 2 else 1e-2 if shared.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(shared, through_gloo, rtol=tolerance, atol=tolerance * 4)


SHAPES = ((40_001, 7), (3,), (300, 400), (2, 2, 2))
"""Of a unit's parameters, in 2 and in 3 parts: with a row too few, of fewer rows than ranks, without a rest."""


class _Unit(torch.nn.Module):
    """Parameters of these shapes; the gradient of each is what `forward` is given for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.zeros(shape) for shape in SHAPES])

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        products = [(weight * one).sum() for weight, one in zip(self.weights, gradients, strict=True)]
        return torch.stack(products).sum()


def _trained(dtype: torch.dtype, put_off: bool, node: bool = False) -> tuple[list[torch.Tensor], int]:
    """What FSDP makes of gradients drawn by rank, and how many messages were sent without being written."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    if node:
        os.environ["GROUP_RANK"] = str(distributed.get_rank())
    taken: list[int] = []
    if put_off:
        gradient_messages.put_off(_fsdp_collectives)
        rows = gradient_messages.Unwritten.rows

        def counted(message: Any, num_ranks: int) -> Any:
            taken.append(num_ranks)
            return rows(message, num_ranks)

        gradient_messages.Unwritten.rows = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(distributed.get_rank())
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    unit = _Unit()
    fully_shard(unit, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for _ in range(2):  # the second adds to the first
        unit(gradients).backward()
    return [parameter.grad.full_tensor() for parameter in unit.parameters()], len(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_are_sent_without_a_copy_are_the_same(world_size: int, dtype: torch.dtype) -> None:
    copied = on_ranks(world_size, _trained, dtype, False)
    sent = on_ranks(world_size, _trained, dtype, True)
    assert [number for _, number in copied] == [0] * world_size
    assert [number for _, number in sent] == [2] * world_size
    for (wanted, _), (gradients, _) in zip(copied, sent, strict=True):
        assert all(map(torch.equal, gradients, wanted)) and all(one.any() for one in wanted)


def test_ranks_of_two_nodes_send_what_fsdp_would() -> None:
    sent, wanted = (on_ranks(2, _trained, torch.bfloat16, put_off, True) for put_off in (True, False))
    for (gradients, number), (others, _) in zip(sent, wanted, strict=True):
        assert number == 0 and all(map(torch.equal, gradients, others))


def _told_apart(node: bool) -> tuple[bool, int]:
    if node:
        os.environ["GROUP_RANK"] = str(distributed.get_rank())
    part = torch.full((COUNTS[0],), float(distributed.get_rank()))
    whole = torch.empty(2 * COUNTS[0])
    distributed.all_gather_single(whole, part)
    return bool((whole.view(2, -1) == torch.tensor([[0.0], [1.0]])).all()), len(_of_this_process())


@pytest.mark.parametrize(("node", "num_memories"), [(False, 1), (True, 0)])
def test_ranks_of_two_nodes_share_no_memory(node: bool, num_memories: int) -> None:
    assert on_ranks(2, _told_apart, node) == [(True, num_memories)] * 2


def _without(name: str) -> tuple[bool, int]:
    if distributed.get_rank() == 1:
        setattr(shared_messages, name, _refused)
    return _told_apart(False)


def _refused(*_: Any) -> Any:
    raise PermissionError("not here")


@pytest.mark.parametrize("name", ["_map", "shared_memory", "Path"])
def test_where_one_rank_may_not_all_go_through_gloo(name: str) -> None:
    """It may not open what others have, has no memory to share, or cannot read which machine it is on."""
    assert on_ranks(2, _without, name) == [(True, 0)] * 2


def _closed() -> tuple[int, int]:
    """Maps of the memory while a second group lives, and once it is destroyed."""
    group = distributed.new_group([0, 1])
    whole = torch.empty(2 * COUNTS[0])
    distributed.all_gather_single(whole, torch.ones(COUNTS[0]), group=group)
    during = _maps()
    distributed.destroy_process_group(group)
    del group
    gc.collect()
    return during, _maps()


def _maps() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:launcher ")


def test_a_group_leaves_nothing_behind() -> None:
    assert on_ranks(2, _closed) == [(2, 0)] * 2


def _kept_to_gloo() -> list[int]:
    """Numbers of memories after messages that have no way through one."""
    rank = distributed.get_rank()
    distributed.all_gather_single(torch.empty(2000), torch.ones(1000))
    output, whole = torch.empty(COUNTS[0]), torch.full((2 * COUNTS[0],), float(rank))
    distributed.reduce_scatter_single(output, whole, op=ReduceOp.MAX)
    assert bool((output == 1).all())
    return [len(_of_this_process())]


def test_small_messages_and_other_operations_go_as_they_did() -> None:
    assert on_ranks(2, _kept_to_gloo) == [[0], [0]]
