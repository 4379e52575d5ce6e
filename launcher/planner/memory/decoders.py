"""Blocks of Llama and models built like it, and the parts that all decoders share."""

from __future__ import annotations

from math import prod
from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.attention import fused, plain, rotate
from launcher.planner.memory.kernel_bytes import attention_bytes
from launcher.planner.memory.loss import cross_entropy
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.memory.symbolic import Parameter, SymbolicTensor, checkpoint
from launcher.planner.memory.symbolic_program import Context, SymbolicProgram, of_stack

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with Llama's architecture."""


class Llama(SymbolicProgram):
    """Llama, Mistral, Qwen 2 and 3: RMS norms, rotary positions, grouped queries, a gated feed-forward part."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.hidden: int = config["hidden_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.wide: int = config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.groups: int = config.get("num_key_value_heads") or self.heads
        self.head: int = config.get("head_dim") or self.hidden // self.heads
        self.vocabulary: int = config["vocab_size"]
        self.tied: bool = config.get("tie_word_embeddings", False)
        kind = config.get("model_type", "llama")
        self.biased = bool(config.get("attention_bias", False)) or kind == "qwen2"
        self.normed = kind == "qwen3"
        self.embeddings = "model.embed_tokens.weight"

    def layer_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names of a layer's parameters, and their shapes [out, in]."""
        queries, keys = self.heads * self.head, self.groups * self.head
        weights: list[tuple[str, tuple[int, ...]]] = []
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            weights.append((f"self_attn.{name}.weight", (width, self.hidden)))
            if self.biased:
                weights.append((f"self_attn.{name}.bias", (width,)))
        weights.append(("self_attn.o_proj.weight", (self.hidden, queries)))
        if self.normed:
            weights += [("self_attn.q_norm.weight", (self.head,)), ("self_attn.k_norm.weight", (self.head,))]
        return [
            *weights,
            ("mlp.gate_proj.weight", (self.wide, self.hidden)),
            ("mlp.up_proj.weight", (self.wide, self.hidden)),
            ("mlp.down_proj.weight", (self.hidden, self.wide)),
            ("input_layernorm.weight", (self.hidden,)),
            ("post_attention_layernorm.weight", (self.hidden,)),
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer."""
        layers = [
            Unit(tuple(Weight(f"model.layers.{i}.{name}", shape) for name, shape in self.layer_weights()))
            for i in range(self.num_layers)
        ]
        root = [
            Weight(self.embeddings, (self.vocabulary, self.hidden)),
            Weight("model.norm.weight", (self.hidden,)),
        ]
        if not self.tied:
            root.append(Weight("lm_head.weight", (self.vocabulary, self.hidden)))
        return Unit(tuple(root), num_first=1), layers

    def forward(self, context: Context) -> SymbolicTensor:
        """Return the loss of the causal task (`heads.py`)."""
        setting = context.setting
        batch, size = setting.batch, setting.itemsize
        context.begin("stem")
        table = context.parameter(self.embeddings, self.vocabulary * self.hidden)
        hidden = ops.embedding(
            context.tensor(batch.num_tokens, 8), batch.num_tokens, self.hidden, size, table
        )
        cosine, sine = (context.tensor(batch.num_tokens * self.head) for _ in range(2))
        # The model's own variable holds this until its layers are done; with frozen layers nothing else keeps
        # it.
        embedded = hidden
        for index in of_stack(context, self.num_layers):
            context.begin("layer", index)
            hidden = checkpoint(
                context.meter,
                setting.checkpointing,
                lambda x, i=index: self.layer(context, i, x, cosine, sine),
                hidden,
            )
        context.begin("tail")
        hidden = ops.rms_norm(hidden, self.hidden, context.parameter("model.norm.weight", self.hidden))
        del embedded
        weight = table if self.tied else context.parameter("lm_head.weight", self.vocabulary * self.hidden)
        supervised = batch.num_tokens - len(batch.lengths)
        return cross_entropy(context, hidden, self.hidden, self.vocabulary, supervised, weight)

    def layer(
        self,
        context: Context,
        index: int,
        hidden: SymbolicTensor,
        cosine: SymbolicTensor,
        sine: SymbolicTensor,
    ) -> SymbolicTensor:
        """Go through one layer, [tokens, hidden] -> [tokens, hidden]."""
        weights = {
            name: context.parameter(f"model.layers.{index}.{name}", prod(shape))
            for name, shape in self.layer_weights()
        }
        residual = hidden
        hidden = ops.rms_norm(hidden, self.hidden, weights["input_layernorm.weight"])
        hidden = self.attention(context, index, hidden, weights, cosine, sine)
        hidden = ops.add(residual, hidden)
        residual = hidden
        hidden = ops.rms_norm(hidden, self.hidden, weights["post_attention_layernorm.weight"])
        hidden = self.feed_forward(context, index, hidden, weights)
        return ops.add(residual, hidden)

    def attention(
        self,
        context: Context,
        index: int,
        hidden: SymbolicTensor,
        weights: dict[str, Any],
        cosine: SymbolicTensor,
        sine: SymbolicTensor,
    ) -> SymbolicTensor:
        queries, keys = self.heads * self.head, self.groups * self.head
        names = f"model.layers.{index}.self_attn."

        def projected(name: str, width: int) -> SymbolicTensor:
            parameters = weights[f"self_attn.{name}_proj.weight"], weights.get(f"self_attn.{name}_proj.bias")
            result = adapted(context, f"{names}{name}_proj", hidden, self.hidden, width, *parameters)
            norm = weights.get(f"self_attn.{name}_norm.weight")
            return result if norm is None else ops.rms_norm(result, norm.num_elements, norm)

        query, key, value = projected("q", queries), projected("k", keys), projected("v", keys)
        rotated = rotate(query, cosine, sine)
        key = rotate(key, cosine, sine)
        query = rotated
        del rotated
        mixed = packed(context, query, key, value, self.heads)
        parameters = weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias")
        return adapted(context, f"{names}o_proj", mixed, queries, self.hidden, *parameters)

    def feed_forward(
        self, context: Context, index: int, hidden: SymbolicTensor, weights: dict[str, Any]
    ) -> SymbolicTensor:
        names = f"model.layers.{index}.mlp."
        gate = adapted(
            context, f"{names}gate_proj", hidden, self.hidden, self.wide, weights["mlp.gate_proj.weight"]
        )
        active = ops.pointwise(gate)
        del gate
        up = adapted(
            context, f"{names}up_proj", hidden, self.hidden, self.wide, weights["mlp.up_proj.weight"]
        )
        both = ops.multiply(active, up)
        del active, up
        return adapted(
            context, f"{names}down_proj", both, self.wide, self.hidden, weights["mlp.down_proj.weight"]
        )


def adapted(
    context: Context,
    name: str,
    x: SymbolicTensor,
    num_in: int,
    num_out: int,
    weight: Parameter,
    bias: Parameter | None = None,
) -> SymbolicTensor:
    """Apply a linear layer like `ops.linear`. With an adapter, its input is saved for A, and A's output for
    B."""
    result, adapter = ops.linear(x, num_in, num_out, weight, bias), context.setting.adapter
    if adapter is None or not adapter.takes(name):
        return result
    down = context.parameter(f"{name}.lora_A.weight", adapter.rank * num_in)
    up = context.parameter(f"{name}.lora_B.weight", adapter.rank * num_out)
    dropped = ops.dropout(x, adapter.dropout if context.setting.training else 0.0, context.setting.cuda)
    inner = ops.linear(dropped, num_in, adapter.rank, down)
    del dropped
    outer = ops.linear(inner, adapter.rank, num_out, up)
    del inner
    scaled = ops.scale(outer)
    del outer
    return ops.add(result, scaled)


def packed(
    context: Context,
    query: SymbolicTensor,
    key: SymbolicTensor,
    value: SymbolicTensor,
    heads: int,
    drop: float = 0.0,
) -> SymbolicTensor:
    """Apply `packed_attention` to all samples at once. With dropout on the scores, each sample is computed by
    itself, and the results are joined to one row."""
    lengths, cuda = context.setting.batch.lengths, context.setting.cuda
    if not (drop and context.setting.training):
        width, key_width = (tensor.num_elements // sum(lengths) for tensor in (query, key))
        forward, backward = attention_bytes(lengths, width, key_width, heads, query.itemsize, cuda)
        result = fused(query, key, value, heads, sum(lengths), hidden=backward)
        context.meter.transient(forward)
        return result
    parts = []
    for length in lengths:
        share = length / sum(lengths)
        q, k, v = (
            SymbolicTensor(round(one.num_elements * share), one.itemsize, one.storage, one.node)
            for one in (query, key, value)
        )
        if not cuda:
            mask = context.tensor(length * length, 5)
            parts.append(plain(q, k, v, heads * length * length, drop, cuda))
            del mask
        else:
            parts.append(fused(q, k, v, heads, length))
    del q, k, v
    whole = parts[0] if len(parts) == 1 else ops.concatenate(*parts)
    # One sample's result already has the layout [tokens, heads, head_dim]; those of several samples were
    # joined along the tokens within each head.
    return ops.copy(whole) if len(lengths) > 1 or not cuda else whole
