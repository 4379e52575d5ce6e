"""Floating-point operations of a micro-batch, depending on the trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from launcher import tasks
from launcher.job.adapter import is_of_virtual_tokens
from launcher.planner.memory.program import Unit
from launcher.planner.plan import Plan

Units = tuple[Unit, list[Unit]]
"""The unit outside of the layers, and the layers."""


@dataclass(frozen=True)
class Operations:
    """Count the floating-point operations of one micro-batch."""

    forward: float
    backward: float
    again: float
    """Operations of recomputed forward passes."""

    @property
    def needed(self) -> float:
        """Return the model's operations without recomputation."""
        return self.forward + self.backward

    @property
    def made(self) -> float:
        return self.needed + self.again


def operations(plan: Plan, units: Units, tokens: int) -> Operations:
    """Return the floating-point operations of a micro-batch with a number of tokens.

    A matrix takes two per element and token: once forward, once for its input's gradient if something before
    it trains, and once for its own gradient if it trains (Kaplan et al. 2020, arXiv 2001.08361, table 1).
    Attention takes 4 x width x length per token forward and twice that backward; half of it if it is causal
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    root, layers = units
    length, traits = plan.data.max_length, tasks.find(plan.task).traits
    forward = backward = again = 0.0
    for unit, passes_back in zip(layers, passing_back(units), strict=True):
        attention = 4 * attention_width(unit) * length * tokens * (0.5 if traits.causal else 1.0)
        products = 2 * tokens * matrix_elements(unit)
        forward += products + attention
        if passes_back:
            backward += products + 2 * attention + 2 * tokens * matrix_elements(unit, trained=True)
            again += products + attention if plan.activation_checkpointing == "full" else 0.0
    # The cost of a head on one token per sample is negligible.
    if traits.head == "every-position":
        # The largest matrix after the layers; with tied weights, the input embeddings.
        behind = [weight for weight in root.weights[root.num_first :] if len(weight.shape) >= 2]
        tables = [weight for weight in root.weights if not is_of_virtual_tokens(weight.name)]
        head = max(behind or tables, key=lambda weight: weight.num_elements)
        last = any(passing_back(units)[-1:])
        forward += 2 * tokens * head.num_elements
        backward += 2 * tokens * head.num_elements * (last + head.trains)
    return Operations(forward, backward, again)


def passing_back(units: Units) -> list[bool]:
    """Return, per layer, whether the backward pass reaches it: something in it or before it trains."""
    root, layers = units
    reached, before = [], any(weight.trains for weight in root.weights[: root.num_first])
    for unit in layers:
        before = before or any(weight.trains for weight in unit.weights)
        reached.append(before)
    return reached


def matrix_elements(unit: Unit, trained: bool = False) -> float:
    """Return the elements of the matrices that are multiplied with one token; only the chosen ones among
    experts count. With `trained`, only trained matrices count."""
    return sum(
        weight.num_elements * weight.used
        for weight in unit.weights
        if len(weight.shape) >= 2 and (weight.trains or not trained) and not is_of_virtual_tokens(weight.name)
    )


def attention_width(unit: Unit) -> int:
    """Return heads x head_dim of a layer: the input width of its output projection."""
    names = ("o_proj.weight", "out_proj.weight", "c_proj.weight", "output.dense.weight", ".o.weight")
    shapes = [
        weight.shape for weight in unit.weights if weight.name.endswith(names) and "mlp" not in weight.name
    ]
    return shapes[0][-1] if shapes else 0
