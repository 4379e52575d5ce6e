"""Half-precision products by way of fp32: the same numbers as PyTorch's own, and only where they are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from launcher.training import cpu_half_matmul, devices
from tests.training.ranks import on_ranks

X86_WITHOUT = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx512_fp16": False, "amx_fp16": False}


@pytest.mark.parametrize(
    ("dtype", "capabilities", "expected"),
    [
        (torch.bfloat16, X86_WITHOUT, False),
        (torch.bfloat16, X86_WITHOUT | {"avx512_bf16": True}, True),
        (torch.bfloat16, X86_WITHOUT | {"amx_bf16": True}, True),
        (torch.float16, X86_WITHOUT | {"avx512_bf16": True}, False),
        (torch.float16, {"neon": True, "fp16": True}, True),
        (torch.bfloat16, {}, True),
    ],
)
def test_units_of_a_processor(dtype: torch.dtype, capabilities: dict[str, Any], expected: bool) -> None:
    assert cpu_half_matmul.has_units(dtype, capabilities) is expected


@pytest.mark.parametrize(
    ("precision", "asked"), [("bf16", [torch.bfloat16]), ("fp16", [torch.float16]), ("fp32", [torch.float32])]
)
def test_a_rank_on_a_cpu_asks_for_them(
    precision: str, asked: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process group itself is left out: this is one process."""
    from tests.training.plans import plan_of

    seen: list[torch.dtype] = []
    monkeypatch.setattr(cpu_half_matmul, "widen", seen.append)
    monkeypatch.setattr(devices.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(devices.distributed, "get_world_size", lambda: 1)
    devices.start_process_group(plan_of("anywhere", 1, precision=precision))
    assert seen == asked


def test_fp32_is_left_as_it_is() -> None:
    assert cpu_half_matmul.widen(torch.float32) is False
    assert not cpu_half_matmul.is_widened(torch.float32)


def _both_ways(dtype: torch.dtype) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    own = _results(dtype)
    cpu_half_matmul._install(dtype)
    return [(name, before, after) for (name, before), (_, after) in zip(own, _results(dtype), strict=True)]


def _results(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """Products that fit into a block and such as are cut along each side; with their gradients."""
    torch.manual_seed(0)
    found = []
    for rows, inner, columns in (
        (64, 96, 200),
        (300, 96, 9000),
        (7, 9000, 30),
        (9000, 50, 60),
        (300, 1200, 1300),
    ):
        scale = inner**-0.5
        left, weight, bias = (
            torch.randn(shape).mul(scale).to(dtype) for shape in ((rows, inner), (columns, inner), (columns,))
        )
        for kind, arguments in (("addmm", (left, weight, bias)), ("mm", (left, weight))):
            leaves = [tensor.clone().requires_grad_() for tensor in arguments]
            output = functional.linear(*leaves)
            output.backward(torch.ones_like(output))
            parts = [output.detach(), *(leaf.grad for leaf in leaves)]
            found += [(f"{kind} {rows}x{inner}x{columns}", part) for part in parts]
        found.append(("mm.out", torch.mm(left, weight.t(), out=torch.empty(rows, columns, dtype=dtype))))
        scaled = torch.addmm(bias, left, weight.t(), beta=0.5, alpha=3)
        found.append(("addmm, scaled", scaled))
    found.append(("bmm", torch.bmm(torch.randn(3, 20, 30).to(dtype), torch.randn(3, 30, 10).to(dtype))))
    for masked in (False, True):
        query, key = (torch.randn(2, heads, 50, 16).to(dtype).requires_grad_() for heads in (6, 2))
        mask = torch.ones(50, 50, dtype=torch.bool).tril(3).triu(-9) if masked else None
        output = functional.scaled_dot_product_attention(
            query, key, key, attn_mask=mask, is_causal=not masked, enable_gqa=True
        )
        output.backward(torch.ones_like(output))
        found += [("attention", part) for part in (output.detach(), query.grad, key.grad) if part is not None]
    wide = torch.randn(40, 50)
    found.append(("fp32", wide @ wide.t()))
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_numbers(dtype: torch.dtype) -> None:
    """Sums in another order round differently now and then; attention rounds less often than PyTorch's kernel
    for half precision."""
    compared = on_ranks(1, _both_ways, dtype)[0]
    assert len(compared) == 5 * 9 + 1 + 6 + 1
    for name, own, wide in compared:
        assert own.dtype == wide.dtype and own.shape == wide.shape, name
        error = (own.double() - wide.double()).norm() / own.double().norm()
        limit = 0.0 if name == "fp32" else 0.01 if name == "attention" else 2e-4
        assert error <= limit, f"{name}: {float(error):.1e}"


def _one_dtype() -> list[bool]:
    cpu_half_matmul._install(torch.float16)
    called: list[torch.dtype] = []
    product = cpu_half_matmul.matrix_product

    def counted(left: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        called.append(left.dtype)
        return product(left, *rest, **named)

    cpu_half_matmul.matrix_product = counted  # type: ignore[assignment]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.ones(4, 5, dtype=dtype) @ torch.ones(5, 3, dtype=dtype)
    return [called == [torch.float16], *map(cpu_half_matmul.is_widened, cpu_half_matmul.HALF)]


@pytest.mark.distributed
def test_only_the_dtype_without_units_is_widened() -> None:
    """A processor may have units for bf16 and none for fp16."""
    assert on_ranks(1, _one_dtype)[0] == [True, False, True]


def _refused() -> list[str]:
    cpu_half_matmul._install(torch.bfloat16)
    half, wide = torch.ones(4, 300, dtype=torch.bfloat16), torch.ones(300, 5)
    found = []
    for work in (
        lambda: half @ wide,
        lambda: half @ torch.ones(301, 5, dtype=torch.bfloat16),
        lambda: torch.addmm(torch.ones(5), half, wide.to(torch.bfloat16)),
        lambda: torch.bmm(half[None], wide.to(torch.bfloat16).expand(2, 300, 5)),
    ):
        try:
            found.append(str(work().dtype))
        except RuntimeError as error:
            found.append(f"refused: {error}")
    return found


@pytest.mark.distributed
def test_operands_that_do_not_go_together_are_refused_as_ever() -> None:
    for said in on_ranks(1, _refused)[0]:
        assert said.startswith("refused: "), said
