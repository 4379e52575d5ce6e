"""Packed attention on a GPU: its result and gradients against fp64, and no value asked of the device."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from launcher.training.model import attention
from launcher.training.model.packed_kernel import note_lengths
from tests.gpu.jobs import DEVICE, IS_REHEARSAL
from tests.training.test_attention import compare, drawn
from tests.training.varlen_on_cpu import a_gpus_way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_hundred_random_shapes(dtype: torch.dtype) -> None:
    """Windows, groups of heads, lengths. Half precision takes PyTorch's operator, fp32 goes sample by sample."""
    if IS_REHEARSAL and dtype == torch.float16:
        pytest.skip("a CPU's stand-in takes bf16 and fp32")
    stand_in = a_gpus_way() if IS_REHEARSAL else contextlib.nullcontext()
    with stand_in:
        for seed in range(20 if IS_REHEARSAL else 200):
            tensors, way = drawn(seed, dtype)
            compare([tensor.to(DEVICE) for tensor in tensors], way)


def test_a_pass_waits_for_nothing() -> None:
    """Each wait is an error: so CUDA's synchronising calls are found wherever they are."""
    stand_in = a_gpus_way() if IS_REHEARSAL else contextlib.nullcontext()
    lengths = [300, 17, 128]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    tensors = [
        torch.randn(1, 4, sum(lengths), 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    ]  # fmt: skip

    note_lengths(ends, lengths)

    def one_pass() -> None:
        result, _ = attention.packed_attention(
            torch.nn.Module(), *tensors, None, cu_seq_lens_q=ends, max_length_q=max(lengths), is_causal=True
        )
        result.sum().backward()

    with stand_in:
        one_pass()  # what is set up once may wait
        if not IS_REHEARSAL:
            torch.cuda.set_sync_debug_mode("error")
        try:
            one_pass()
        finally:
            if not IS_REHEARSAL:
                torch.cuda.set_sync_debug_mode("default")
