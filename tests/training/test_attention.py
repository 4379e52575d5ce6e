"""Packed attention: a CPU's operator and a GPU's way against fp64, without a value asked, without graph breaks."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

from launcher.training.model import attention
from launcher.training.model.packed_kernel import note_lengths
from tests.training.varlen_on_cpu import a_gpus_way

WAYS = {"cpu": contextlib.nullcontext, "gpu": a_gpus_way}
NEAR = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """In fp64 with all scores written out, [1, tokens, heads, head_dim]."""
    times = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(len(sample))
    distance = position[:, None] - position[None, :]
    seen = sample[:, None] == sample[None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def drawn(seed: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Query, key, value and a gradient of random shape, and how they are attended."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    lengths = [one_of(1, 2, 7, 16, 33, 64, 90) for _ in range(one_of(1, 2, 3, 6))]
    groups, times, width = one_of(1, 2, 3), one_of(1, 2, 4), one_of(8, 16, 32)
    way = {"lengths": lengths, "causal": one_of(True, True, False), "window": one_of(None, None, 1, 5, 40)}
    shapes = [(groups * times, width), (groups, width), (groups, width), (groups * times, width)]
    tensors = [
        torch.randn(1, sum(lengths), *shape, generator=generator).to(dtype).transpose(1, 2)
        for shape in shapes
    ]
    return tensors, way


def compare(tensors: list[torch.Tensor], way: dict[str, Any], **options: Any) -> None:
    """Result and gradients on the tensors' device against fp64 on the CPU, by the norm of the difference."""
    inputs = [tensor.requires_grad_() for tensor in tensors[:3]]
    ends = torch.tensor([0, *itertools.accumulate(way["lengths"])], dtype=torch.int32).to(inputs[0].device)
    result, _ = attention.packed_attention(
        torch.nn.Module(), *inputs, None, cu_seq_lens_q=ends, max_length_q=max(way["lengths"]),
        sliding_window=way["window"], is_causal=way["causal"], **options,
    )  # fmt: skip
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]
    wanted = expected(*exact, **way)
    along = tensors[3].transpose(1, 2)
    ours = [result, *torch.autograd.grad(result, inputs, along)]
    theirs = [wanted, *torch.autograd.grad(wanted, exact, along.cpu().double())]
    for one, other in zip(ours, theirs, strict=True):
        # Where hardly anything is seen, gradients are sums that come to nothing.
        one, other = one.detach().cpu().double(), other.detach()
        most = max(float(other.norm()), 0.1 * float(along.norm()))
        assert float((one - other).norm()) <= NEAR[tensors[0].dtype] * most, (way, one.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", list(WAYS))
def test_gradients_against_fp64_over_random_shapes(way: str, dtype: torch.dtype) -> None:
    with WAYS[way]():
        for seed in range(100):
            compare(*drawn(seed, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "window"),
    [
        (1023, None),
        (1025, 300),
        *(pytest.param(4096, window, marks=pytest.mark.very_slow) for window in (None, 700)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_samples_against_fp64(length: int, window: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    tensors = [torch.randn(1, heads, length, 16, generator=generator).to(dtype) for heads in (2, 1, 1, 2)]
    compare(tensors, {"lengths": [length], "causal": True, "window": window})


@pytest.mark.parametrize("seed", range(6))
def test_sample_by_sample_as_where_no_operator_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft cap far above any score goes by the loop, which changes nothing; so do lengths that are noted."""
    tensors, way = drawn(seed, torch.float32)
    noted: list[torch.Tensor] = []
    lengths_of = attention.lengths_of
    monkeypatch.setattr(attention, "lengths_of", lambda ends: (noted.append(ends), lengths_of(ends))[1])
    compare(tensors, way | {"causal": True}, softcap=1e4)
    assert len(noted) == 1


def test_the_operator_of_this_pytorch_is_used() -> None:
    """Its signature is the one that a GPU's way is written for."""
    attention.register("packed")
    assert attention.varlen() is not None


def test_another_signature_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    attention.varlen.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, is_causal=False: query)
    assert attention.varlen() is None
    attention.varlen.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, *, scale, window_size: key)
    repeated = attention.varlen()
    assert repeated is not None
    query, key = torch.ones(5, 4, 8), torch.arange(2.0).view(1, 2, 1).expand(5, 2, 8)
    given = repeated(query, key, key, scale=1.0, window_size=(-1, 0))
    assert given[0, :, 0].tolist() == [0, 0, 1, 1]
    attention.varlen.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "options", "grouped"),
    [
        (torch.float16, {"dropout": 0.1}, [True, True]),
        (torch.float16, {"softcap": 30.0}, []),
        (torch.float32, {}, [False, False]),
        (torch.float16, {"dropout": 0.1, "sliding_window": 2}, [False, True]),
    ],
)
def test_what_a_gpus_operator_has_not_goes_by_the_loop(
    dtype: torch.dtype, options: dict[str, Any], grouped: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without numbers that are taken for a GPU's, so that only noted lengths can be read.

    Grouped heads are left to the kernel where it does not write the scores out for them.
    """
    monkeypatch.setattr(attention, "VARLEN_DEVICES", {"meta"})
    monkeypatch.setattr(attention, "_at_once", None)
    fused, seen = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (seen.append(k["enable_gqa"]), fused(*a, **k))[1],
    )
    with torch.device("meta"):
        ends, query, key = (
            torch.zeros(3),
            torch.ones(1, 4, 5, 8, dtype=dtype),
            torch.ones(1, 2, 5, 8, dtype=dtype),
        )
    note_lengths(ends, [3, 2])
    result, _ = attention.packed_attention(
        torch.nn.Module(), query, key, key, None, cu_seq_lens_q=ends, max_length_q=3, **options
    )
    assert result.shape == (1, 5, 4, 8)
    assert seen == grouped
