"""Blocks of mixtures of experts: Mixtral, Qwen 2 and 3 MoE, OLMoE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.decoders import Llama, split
from launcher.planner.memory.program import Context, Unit, Weight
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, new, node_of


def _viewed(weight: Weight, share: float) -> Weight:
    """Experts, of which a token goes through a share, and their router are no linear layers."""
    if len(weight.shape) == 3:
        return replace(weight, used=share, viewed=True)
    return replace(weight, viewed=True) if weight.name.endswith("mlp.gate.weight") else weight


class Mixture(Llama):
    """Llama's layers with several feed-forward parts, of which a router chooses some for each token.

    transformers 5.23 multiplies with all experts at once wherever torch can (`experts_implementation` left
    out: `grouped_mm`, on a CPU and on a GPU alike; a GPU older than Ampere takes a loop of the same sizes).
    The rows are copied, once for each expert that is chosen, and sorted by expert: tokens x experts per token
    of them, however the router spreads them. So even routing and uneven need the same memory to the byte; all
    parameters of all experts are gathered, and all have gradients, those of experts that no one chose zeros.
    Not so with `experts_implementation: eager`, which goes through the experts one by one: the formulas do
    not know that.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__({"intermediate_size": 0} | config)
        self.kind: str = config["model_type"]
        both = config.get("num_local_experts", config.get("num_experts"))
        # KeyError by the name that the family's own config gives it.
        self.experts: int = both or config["num_local_experts" if self.kind == "mixtral" else "num_experts"]
        self.chosen: int = config["num_experts_per_tok"]
        self.expert: int = config[
            "moe_intermediate_size" if self.kind.endswith("_moe") else "intermediate_size"
        ]
        self.shared: int = config["shared_expert_intermediate_size"] if self.kind == "qwen2_moe" else 0
        self.biased = bool(
            config.get("qkv_bias", True) if self.kind == "qwen2_moe" else config.get("attention_bias", False)
        )
        self.normed = self.kind in ("qwen3_moe", "olmoe")
        self.normalises = self.kind == "mixtral" or bool(config.get("norm_topk_prob", False))
        plain, every = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
        self.sparse = [index not in plain and (index + 1) % every == 0 for index in range(self.num_layers)]

    @property
    def alike(self) -> bool:
        return all(self.sparse)

    def layer_weights(self, index: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names within a layer, and shapes [out, in], of experts [expert, out, in]."""
        found: list[tuple[str, tuple[int, ...]]] = []
        for name, shape in super().layer_weights(index):
            if name.startswith("mlp."):
                found += (
                    self._expert_weights() if self.sparse[index] and name == "mlp.gate_proj.weight" else []
                )
                found += [] if self.sparse[index] else [(name, shape)]
            elif self.kind == "olmoe" and name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
                found.append((name, (self.head * (self.heads if "q_norm" in name else self.groups),)))
            else:
                found.append((name, shape))
                if name == "self_attn.o_proj.weight" and self.biased and self.kind != "qwen2_moe":
                    found.append(("self_attn.o_proj.bias", (self.hidden,)))
        return found

    def _expert_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        router = [("mlp.gate.weight", (self.experts, self.hidden))]
        found: list[tuple[str, tuple[int, ...]]] = [
            ("mlp.experts.gate_up_proj", (self.experts, 2 * self.expert, self.hidden)),
            ("mlp.experts.down_proj", (self.experts, self.hidden, self.expert)),
        ]
        found = [*found, *router] if self.kind == "qwen3_moe" else [*router, *found]
        if self.shared:
            found += [
                (f"mlp.shared_expert.{name}_proj.weight", (self.shared, self.hidden))
                for name in ("gate", "up")
            ]
            found += [
                ("mlp.shared_expert.down_proj.weight", (self.hidden, self.shared)),
                ("mlp.shared_expert_gate.weight", (1, self.hidden)),
            ]
        return found

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""
        root, layers = super().units()
        share = self.chosen / self.experts
        return root, [Unit(tuple(_viewed(weight, share) for weight in layer.weights)) for layer in layers]

    def feed_forward(
        self, context: Context, index: int, hidden: SymbolicTensor, weights: dict[str, Any]
    ) -> SymbolicTensor:
        if "mlp.gate.weight" not in weights:
            return super().feed_forward(context, index, hidden, weights)
        shared = self._shared_expert(hidden, weights) if self.shared else None
        scores, chosen = self._routed(hidden, weights["mlp.gate.weight"])
        result = self._mixed(hidden, scores, weights)
        del scores, chosen
        if shared is None:
            return result
        gate = ops.pointwise(
            ops.linear(hidden, self.hidden, 1, weights["mlp.shared_expert_gate.weight"]), "output"
        )
        shared = ops.multiply(gate, shared)
        return ops.add(result, shared)

    def _shared_expert(self, hidden: SymbolicTensor, weights: dict[str, Any]) -> SymbolicTensor:
        of = {name: weights[f"mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")}
        active = ops.pointwise(ops.linear(hidden, self.hidden, self.shared, of["gate"]))
        both = ops.multiply(active, ops.linear(hidden, self.hidden, self.shared, of["up"]))
        del active
        return ops.linear(both, self.shared, self.hidden, of["down"])

    def _routed(self, hidden: SymbolicTensor, weight: Parameter) -> tuple[SymbolicTensor, SymbolicTensor]:
        """The router: the scores of the chosen experts, fp32 in Mixtral alone, and their numbers."""
        meter, tokens = hidden.meter, hidden.num_elements // self.hidden
        logits = ops.linear(hidden, self.hidden, self.experts, weight)
        likely = ops.pointwise(ops.cast(logits, 4), "output")
        of_all = likely.num_elements * 4
        node = node_of(meter, (likely,), lambda gradient: [Storage(meter, of_all)])
        chosen = new(meter, tokens * self.chosen, 8)
        if node is not None:
            node.save(chosen.storage)
        scores = new(meter, tokens * self.chosen, 4, node)
        if self.normalises:
            scores = _normalised(scores, tokens)
        return scores if self.kind == "mixtral" else ops.cast(scores, logits.itemsize), chosen

    def _mixed(
        self, hidden: SymbolicTensor, scores: SymbolicTensor, weights: dict[str, Any]
    ) -> SymbolicTensor:
        """`grouped_mm_experts_forward`: rows sorted by expert, two products, weighted, in their old order
        again, added up."""
        meter, rows = hidden.meter, scores.num_elements
        sorted_experts, order = new(meter, rows, 8), new(meter, rows, 8)
        chosen = _rows(hidden, rows * self.hidden, new(meter, rows, 8))
        sorted_scores = _rows(scores, rows, order)
        histogram = new(meter, rows, 4)
        wide = grouped(chosen, self.hidden, 2 * self.expert, weights["mlp.experts.gate_up_proj"])
        gate, up = split(wide, 2)
        del wide
        both = ops.multiply(ops.pointwise(gate), up)
        del gate, up
        narrow = grouped(both, self.expert, self.hidden, weights["mlp.experts.down_proj"])
        weighted = ops.multiply(narrow, sorted_scores)
        back = new(meter, rows, 8)
        weighted = _rows(weighted, rows * self.hidden, back)
        result = ops.cast(
            ops.pointwise(weighted, "nothing", num_elements=hidden.num_elements), hidden.itemsize
        )
        del sorted_experts, histogram, both, narrow
        return result


def grouped(x: SymbolicTensor, num_in: int, num_out: int, weight: Parameter) -> SymbolicTensor:
    """`grouped_mm`: rows by expert, each with its own matrix; selective checkpointing does not keep it."""
    meter, rows, size, x_needs = x.meter, x.num_elements // num_in, x.itemsize, x.needs_gradient

    def gradients(gradient: Storage) -> list[Storage | None]:
        of_x = Storage(meter, rows * num_in * size) if x_needs else None
        return [of_x, Storage(meter, weight.num_elements * size) if weight.trains else None]

    node = node_of(meter, (x, weight), gradients)
    if node is not None:
        if weight.trains:
            node.save(x.storage)
        if x_needs:
            node.save(None)
    return new(meter, rows * num_out, size, node)


def _rows(x: SymbolicTensor, num_elements: int, index: SymbolicTensor) -> SymbolicTensor:
    """`x[index]`: it keeps the index, and its gradient is as large as `x`."""
    meter, num_bytes = x.meter, x.num_elements * x.itemsize
    node = node_of(meter, (x,), lambda gradient: [Storage(meter, num_bytes)])
    if node is not None:
        node.save(index.storage)
    return new(meter, num_elements, x.itemsize, node)


def _normalised(scores: SymbolicTensor, tokens: int) -> SymbolicTensor:
    """Divided in place by their sum, of which and of what they were it keeps copies."""
    meter, num_bytes = scores.meter, scores.num_elements * scores.itemsize
    total = new(meter, tokens, 4)
    before = new(meter, scores.num_elements, 4)
    node = node_of(meter, (scores,), lambda gradient: [Storage(meter, num_bytes)])
    if node is not None:
        node.save(total.storage)
        node.save(before.storage)
    return SymbolicTensor(scores.num_elements, 4, scores.storage, node)


__all__ = ["Mixture", "grouped"]
