"""Blocks of Llama and models built like it, and of GPT-2."""

from __future__ import annotations

from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.attention import fused, plain, rotate
from launcher.planner.memory.loss import cross_entropy
from launcher.planner.memory.program import Context, SymbolicProgram, Unit, Weight, of_stack
from launcher.planner.memory.symbolic import (
    Parameter,
    Storage,
    SymbolicTensor,
    attention_bytes,
    checkpoint,
    node_of,
)

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
"""Built as Llama is."""


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

    @property
    def alike(self) -> bool:
        """Whether all layers are of one kind."""
        return True

    def layer_weights(self, index: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names within a layer, and shapes [out, in]."""
        queries, keys = self.heads * self.head, self.groups * self.head
        found: list[tuple[str, tuple[int, ...]]] = []
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            found.append((f"self_attn.{name}.weight", (width, self.hidden)))
            if self.biased:
                found.append((f"self_attn.{name}.bias", (width,)))
        found.append(("self_attn.o_proj.weight", (self.hidden, queries)))
        if self.normed:
            found += [("self_attn.q_norm.weight", (self.head,)), ("self_attn.k_norm.weight", (self.head,))]
        found += [
            ("mlp.gate_proj.weight", (self.wide, self.hidden)),
            ("mlp.up_proj.weight", (self.wide, self.hidden)),
        ]
        found.append(("mlp.down_proj.weight", (self.hidden, self.wide)))
        return [
            *found,
            ("input_layernorm.weight", (self.hidden,)),
            ("post_attention_layernorm.weight", (self.hidden,)),
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""
        layers = [
            Unit(tuple(Weight(f"model.layers.{i}.{name}", shape) for name, shape in self.layer_weights(i)))
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
        """The causal task of `heads.py`."""
        setting = context.setting
        batch, size = setting.batch, setting.itemsize
        context.begin("stem")
        table = context.parameter(self.embeddings, self.vocabulary * self.hidden)
        hidden = ops.embedding(
            context.tensor(batch.num_tokens, 8), batch.num_tokens, self.hidden, size, table
        )
        cosine, sine = (
            context.tensor(batch.num_tokens * self.head),
            context.tensor(batch.num_tokens * self.head),
        )
        # the model's own variable, until its layers are done: of frozen layers nothing else would keep it
        embedded = hidden
        for index in of_stack(context, self.num_layers) if self.alike else range(self.num_layers):
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
        """[tokens, hidden] -> [tokens, hidden]."""
        weights = {
            name: context.parameter(f"model.layers.{index}.{name}", count(shape))
            for name, shape in self.layer_weights(index)
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
            made = adapted(context, f"{names}{name}_proj", hidden, self.hidden, width, *parameters)
            norm = weights.get(f"self_attn.{name}_norm.weight")
            return made if norm is None else ops.rms_norm(made, norm.num_elements, norm)

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
    """A linear layer as `ops.linear` has it; beside an adapter its input is kept for A, and what A makes for
    B."""
    made, adapter = ops.linear(x, num_in, num_out, weight, bias), context.setting.adapter
    if adapter is None or not adapter.takes(name):
        return made
    down, up = (
        context.parameter(f"{name}.lora_{key}.weight", adapter.rank * size)
        for key, size in (("A", num_in), ("B", num_out))
    )
    dropped = ops.dropout(x, adapter.dropout if context.setting.training else 0.0, context.setting.cuda)
    inner = ops.linear(dropped, num_in, adapter.rank, down)
    del dropped
    outer = ops.linear(inner, adapter.rank, num_out, up)
    del inner
    scaled = ops.scale(outer)
    del outer
    return ops.add(made, scaled)


def packed(
    context: Context,
    query: SymbolicTensor,
    key: SymbolicTensor,
    value: SymbolicTensor,
    heads: int,
    drop: float = 0.0,
) -> SymbolicTensor:
    """`packed_attention`: all samples at once; to drop some of the scores each sample by itself, then one row
    again."""
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
        q, k, v = (_part(tensor, share) for tensor in (query, key, value))
        if not cuda:
            mask = context.tensor(length * length, 5)
            parts.append(plain(q, k, v, heads * length * length, 1, drop, cuda))
            del mask
        else:
            parts.append(fused(q, k, v, heads, length))
    del q, k, v
    whole = parts[0] if len(parts) == 1 else ops.concatenate(*parts)
    # One sample's result lies as [tokens, heads, head_dim] already; several have been joined along the tokens
    # within each head.
    return ops.copy(whole) if len(lengths) > 1 or not cuda else whole


def _part(tensor: SymbolicTensor, share: float) -> SymbolicTensor:
    return SymbolicTensor(round(tensor.num_elements * share), tensor.itemsize, tensor.storage, tensor.node)


def count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def new_gelu(x: SymbolicTensor) -> SymbolicTensor:
    """transformers' NewGELUActivation, operator by operator."""
    half = ops.scale(x)
    inner = ops.scale(ops.pointwise(x, "input", temporaries=1))
    inner = ops.add(x, inner)
    inner = ops.scale(inner)
    inner = ops.pointwise(inner, "output")
    inner = ops.scale(inner)
    return ops.multiply(half, inner)


def split(x: SymbolicTensor, parts: int) -> list[SymbolicTensor]:
    """Views of one tensor; their gradients are put together in a new one."""
    meter, num_bytes = x.meter, x.num_elements * x.itemsize

    def gradients(gradient: Storage) -> list[Storage | None]:
        meter.transient(num_bytes + num_bytes * (parts - 1) // parts)
        return [Storage(meter, num_bytes)]

    node = node_of(meter, (x,), gradients)
    return [SymbolicTensor(x.num_elements // parts, x.itemsize, x.storage, node) for _ in range(parts)]


class Gpt2(SymbolicProgram):
    """GPT-2: learned positions, one matrix for query, key and value, an activation written out in eight
    operators."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.hidden: int = config["n_embd"]
        self.num_layers: int = config["n_layer"]
        self.heads: int = config["n_head"]
        self.wide: int = config.get("n_inner") or 4 * self.hidden
        self.vocabulary: int = config["vocab_size"]
        self.positions: int = config["n_positions"]
        self.drop = {key: config.get(f"{key}_pdrop", 0.1) for key in ("resid", "embd", "attn")}
        self.embeddings = "transformer.wte.weight"

    def layer_weights(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names within a layer, and shapes [in, out]."""
        found: list[tuple[str, tuple[int, ...]]] = [
            ("ln_1.weight", (self.hidden,)),
            ("ln_1.bias", (self.hidden,)),
        ]
        parts = {"attn.c_attn": (self.hidden, 3 * self.hidden), "attn.c_proj": (self.hidden, self.hidden)}
        for name, (num_in, num_out) in parts.items():
            found += [(f"{name}.weight", (num_in, num_out)), (f"{name}.bias", (num_out,))]
        found += [("ln_2.weight", (self.hidden,)), ("ln_2.bias", (self.hidden,))]
        parts = {"mlp.c_fc": (self.hidden, self.wide), "mlp.c_proj": (self.wide, self.hidden)}
        for name, (num_in, num_out) in parts.items():
            found += [(f"{name}.weight", (num_in, num_out)), (f"{name}.bias", (num_out,))]
        return found

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""
        layers = [
            Unit(
                tuple(
                    Weight(f"transformer.h.{i}.{name}", shape, input_first=len(shape) == 2)
                    for name, shape in self.layer_weights()
                )
            )
            for i in range(self.num_layers)
        ]
        root = [
            Weight(self.embeddings, (self.vocabulary, self.hidden)),
            Weight("transformer.wpe.weight", (self.positions, self.hidden)),
        ]
        last = [Weight(f"transformer.ln_f.{name}", (self.hidden,)) for name in ("weight", "bias")]
        return Unit((*root, *last), num_first=2), layers

    def forward(self, context: Context) -> SymbolicTensor:
        """The causal task of `heads.py`."""
        setting = context.setting
        tokens, size = setting.batch.num_tokens, setting.itemsize
        context.begin("stem")
        weights = {
            weight.name: context.parameter(weight.name, weight.num_elements)
            for weight in self.units()[0].weights
        }
        ids = context.tensor(2 * tokens, 8)
        words = ops.embedding(ids, tokens, self.hidden, size, weights[self.embeddings])
        places = ops.embedding(ids, tokens, self.hidden, size, weights["transformer.wpe.weight"])
        hidden = ops.dropout(ops.add(words, places), self.drop["embd"], setting.cuda)
        for index in of_stack(context, self.num_layers):
            context.begin("layer", index)
            hidden = checkpoint(
                context.meter, setting.checkpointing, lambda x, i=index: self.layer(context, i, x), hidden
            )
        context.begin("tail")
        hidden = ops.layer_norm(
            hidden, self.hidden, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]
        )
        del words, places
        return cross_entropy(
            context,
            hidden,
            self.hidden,
            self.vocabulary,
            tokens - len(setting.batch.lengths),
            weights[self.embeddings],
        )

    def layer(self, context: Context, index: int, hidden: SymbolicTensor) -> SymbolicTensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        cuda, width = context.setting.cuda, self.hidden
        names = f"transformer.h.{index}."
        weights = {
            name: context.parameter(f"transformer.h.{index}.{name}", count(shape))
            for name, shape in self.layer_weights()
        }
        residual = hidden
        hidden = ops.layer_norm(hidden, width, weights["ln_1.weight"], weights["ln_1.bias"])
        three = adapted(
            context,
            f"{names}attn.c_attn",
            hidden,
            width,
            3 * width,
            weights["attn.c_attn.weight"],
            weights["attn.c_attn.bias"],
        )
        query, key, value = split(three, 3)
        mixed = packed(context, query, key, value, self.heads, self.drop["attn"])
        del three, query, key, value
        mixed = adapted(
            context,
            f"{names}attn.c_proj",
            mixed,
            width,
            width,
            weights["attn.c_proj.weight"],
            weights["attn.c_proj.bias"],
        )
        mixed = ops.dropout(mixed, self.drop["resid"], cuda)
        hidden = ops.add(mixed, residual)
        del mixed
        residual = hidden
        hidden = ops.layer_norm(hidden, width, weights["ln_2.weight"], weights["ln_2.bias"])
        hidden = adapted(
            context,
            f"{names}mlp.c_fc",
            hidden,
            width,
            self.wide,
            weights["mlp.c_fc.weight"],
            weights["mlp.c_fc.bias"],
        )
        hidden = new_gelu(hidden)
        hidden = adapted(
            context,
            f"{names}mlp.c_proj",
            hidden,
            self.wide,
            width,
            weights["mlp.c_proj.weight"],
            weights["mlp.c_proj.bias"],
        )
        return ops.add(residual, ops.dropout(hidden, self.drop["resid"], cuda))
