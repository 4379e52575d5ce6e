"""What a CPU's kernels take within themselves, against what the allocator counts of a real call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from launcher.planner.memory.kernel_bytes import attention_bytes
from launcher.training import cpu_half_matmul
from launcher.training.model.packed_kernel import note_lengths, packed
from launcher.training.tracing.kernels import taken_within
from tests.training.ranks import on_ranks

_aten = torch.ops.aten


def highest(function: Any, arguments: tuple[Any, ...]) -> int:
    """The most bytes that a call has at once, with its results, by the profiler's own sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            results = function(*arguments)
        moments = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    finally:
        torch.set_num_threads(threads)
    level = most = 0
    for moment in sorted(moments, key=lambda moment: moment.start_ns()):
        level += moment.nbytes()
        most = max(most, level)
    del results
    return most


def _convolution(samples: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x, weight = torch.rand(samples, 8, 20, 20).to(dtype), torch.rand(16, 8, 3, 3).to(dtype)
    return x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def _normalised(dtype: torch.dtype) -> tuple[Any, ...]:
    """A layer norm over a sound's features, which convolutions leave as the second dimension."""
    return torch.rand(2, 8, 500).to(dtype).transpose(1, 2), [8], torch.ones(8).to(dtype), None, 1e-5


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (_aten.mm.default, (torch.rand(62, 300).half(), torch.rand(300, 48).half())),
        (_aten.mm.default, (torch.rand(62, 300).bfloat16().t(), torch.rand(62, 48).bfloat16())),
        (
            _aten.addmm.default,
            (torch.rand(48).bfloat16(), torch.rand(64, 96).bfloat16(), torch.rand(96, 48).bfloat16()),
        ),
        (_aten.convolution.default, _convolution(3)),
        (_aten.convolution.default, _convolution(2, torch.bfloat16)),
        (_aten._scaled_dot_product_flash_attention_for_cpu.default, (torch.rand(2, 4, 40, 16),) * 3),
        (_aten.gather.default, (torch.rand(8, 40, 60).bfloat16(), -1, torch.zeros(8, 40, 40).long())),
        (
            _aten.scatter_add.default,
            (torch.rand(8, 40, 60).half(), -1, torch.zeros(8, 40, 40).long(), torch.rand(8, 40, 40).half()),
        ),
        (_aten.native_layer_norm.default, _normalised(torch.float32)),
        (_aten.native_layer_norm.default, _normalised(torch.bfloat16)),
        (_aten._safe_softmax.default, (torch.rand(2, 4, 50, 50), -1)),
        (_aten.mean.dim, (torch.rand(2, 64, 30).bfloat16(), [-1])),
        (_aten.roll.default, (torch.rand(2, 8, 8, 48), [-3, -3], [1, 2])),
    ],
)
def test_a_kernel_takes_what_the_allocator_counts(function: Any, arguments: tuple[Any, ...]) -> None:
    results = [one for one in pytree.tree_leaves(function(*arguments)) if isinstance(one, torch.Tensor)]
    kept = sum(one.untyped_storage().nbytes() for one in results)
    assert taken_within(function, arguments) == highest(function, arguments) - kept


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (_aten.gather.default, (torch.rand(8, 40, 60).bfloat16(), -1, torch.zeros(8, 40, 40).long())),
        (_aten.native_layer_norm.default, _normalised(torch.float32)),
        (_aten.mean.dim, (torch.rand(2, 64, 30).bfloat16(), [-1])),
    ],
)
def test_operators_that_copy_are_counted(function: Any, arguments: tuple[Any, ...]) -> None:
    assert (taken_within(function, arguments) or 0) > 0


def test_a_copy_too_large_to_be_made_is_counted_by_the_sample() -> None:
    def large(samples: int) -> int | None:
        x, index = torch.empty(1).bfloat16(), torch.zeros(1, dtype=torch.int64)
        return taken_within(
            _aten.gather.default, (x.expand(samples, 300, 1040), -1, index.expand(samples, 300, 300))
        )

    assert large(400) == 400 // 2 * (large(2) or 0) > 0


@pytest.mark.distributed
def test_attention_by_way_of_fp32_has_copies_of_its_mask_too() -> None:
    """In a process of its own, whose products stay so. What is too large to be run has as many."""
    small, same, large, counted, packed_samples = on_ranks(1, _by_way_of_fp32)[0]
    assert small == same
    assert large == counted
    assert attention_bytes((60, 68), 128, 128, 4, 2, False, widened=True)[0] == pytest.approx(
        packed_samples, abs=64
    )


def _by_way_of_fp32() -> list[int | None]:
    cpu_half_matmul._install(torch.bfloat16)
    function, query = _aten._scaled_dot_product_flash_attention_for_cpu, torch.rand(2, 4, 40, 16).bfloat16()
    mask = torch.zeros(2, 1, 40, 40, dtype=torch.bfloat16)
    taken = taken_within(function.default, (query,) * 3, {"attn_mask": mask})
    results = function(query, query, query)
    kept = sum(one.untyped_storage().nbytes() for one in results)
    called = highest(lambda *tensors: function(*tensors, attn_mask=mask), (query,) * 3)
    long = torch.empty(1).bfloat16().expand(1, 16, 8192, 64)
    wide = torch.empty(1).bfloat16().expand(1, 1, 8192, 8192)
    large = taken_within(function.default, (long,) * 3, {"attn_mask": wide})
    ends, row = torch.tensor([0, 60, 128], dtype=torch.int32), torch.rand(1, 4, 128, 32).bfloat16()
    note_lengths(ends, (60, 68))
    packed_samples = taken_within(packed._opoverload, (row, row, row, ends, 0.1, True, None))
    copied = 4 * (3 * long.numel() + wide.numel()) + 2 * long.numel()
    return [taken, called - kept, large, copied, packed_samples]


def test_attention_over_packed_samples_has_one_sample_at_a_time_beside_the_row() -> None:
    """The longest one's result and sums, and a block of scores; not those of the sample before."""
    ends = torch.tensor([0, 60, 128], dtype=torch.int32)
    note_lengths(ends, (60, 68))
    query = torch.rand(1, 4, 128, 32)
    block = 4 * (32 * 68 + 2 * 32 + 32 * 32)
    taken = taken_within(packed._opoverload, (query, query, query, ends, 0.1, True, None))
    assert taken == pytest.approx(68 * 4 * (4 * 32 + 4) + block, abs=64)


def test_a_convolution_too_large_to_be_run_is_asked_for_two_samples() -> None:
    def large(samples: int) -> int | None:
        x = torch.empty(1).expand(samples, 64, 112, 112)
        options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        return taken_within(_aten.convolution.default, (x, torch.rand(64, 64, 3, 3), None, *options))

    one, two, many = large(1), large(2), large(12)
    assert one is not None and two is not None and many == one + 11 * (two - one) > 10 * one


def test_a_product_into_a_tensor_that_is_there_takes_as_much() -> None:
    """As the loss multiplies. In fp16 only some processors take any; in bf16 all that oneDNN multiplies on."""
    both = []
    for dtype in (torch.float16, torch.bfloat16):
        arguments = (torch.rand(62, 300).to(dtype), torch.rand(300, 48).to(dtype))
        both.append((taken_within(_aten.mm.out, arguments), taken_within(_aten.mm.default, arguments)))
    assert all(out is not None and out == fresh for out, fresh in both)
    assert both[1][1] or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_what_takes_nothing_and_what_is_large_are_not_run() -> None:
    assert taken_within(_aten.mm.default, (torch.rand(4, 4), torch.rand(4, 4))) is None, "in fp32 by MKL"
    assert taken_within(_aten.add.Tensor, (torch.rand(4), torch.rand(4))) is None
    large = torch.empty(1).bfloat16().expand(1 << 14, 1 << 14)
    assert taken_within(_aten.mm.default, (large, large)) is None
