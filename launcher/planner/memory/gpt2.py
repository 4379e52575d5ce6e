"""Blocks of GPT-2."""

from __future__ import annotations

from math import prod
from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.decoders import adapted, packed
from launcher.planner.memory.loss import cross_entropy
from launcher.planner.memory.program import Unit, Weight
from launcher.planner.memory.symbolic import Storage, SymbolicTensor, checkpoint, node_of
from launcher.planner.memory.symbolic_program import Context, SymbolicProgram, of_stack


def new_gelu(x: SymbolicTensor) -> SymbolicTensor:
    """Apply transformers' NewGELUActivation, operator by operator."""
    half = ops.scale(x)
    inner = ops.scale(ops.pointwise(x, "input", temporaries=1))
    inner = ops.add(x, inner)
    inner = ops.scale(inner)
    inner = ops.pointwise(inner, "output")
    inner = ops.scale(inner)
    return ops.multiply(half, inner)


def split(x: SymbolicTensor, parts: int) -> list[SymbolicTensor]:
    """Return views of one tensor; the backward pass concatenates their gradients in a new one."""
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
        """Return the names of a layer's parameters, and their shapes [in, out]."""
        shapes: dict[str, tuple[int, ...]] = {
            "ln_1": (self.hidden,),
            "attn.c_attn": (self.hidden, 3 * self.hidden),
            "attn.c_proj": (self.hidden, self.hidden),
            "ln_2": (self.hidden,),
            "mlp.c_fc": (self.hidden, self.wide),
            "mlp.c_proj": (self.wide, self.hidden),
        }
        return [
            weight
            for name, shape in shapes.items()
            for weight in ((f"{name}.weight", shape), (f"{name}.bias", shape[-1:]))
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer."""
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
        """Return the loss of the causal task (`heads.py`)."""
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
        last = weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"]
        hidden = ops.layer_norm(hidden, self.hidden, *last)
        del words, places
        supervised = tokens - len(setting.batch.lengths)
        return cross_entropy(
            context, hidden, self.hidden, self.vocabulary, supervised, weights[self.embeddings]
        )

    def layer(self, context: Context, index: int, hidden: SymbolicTensor) -> SymbolicTensor:
        """Go through one layer, [tokens, hidden] -> [tokens, hidden]."""
        cuda, width = context.setting.cuda, self.hidden
        weights = {
            name: context.parameter(f"transformer.h.{index}.{name}", prod(shape))
            for name, shape in self.layer_weights()
        }

        def linear(name: str, x: SymbolicTensor, num_in: int, num_out: int) -> SymbolicTensor:
            parameters = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return adapted(context, f"transformer.h.{index}.{name}", x, num_in, num_out, *parameters)

        residual = hidden
        hidden = ops.layer_norm(hidden, width, weights["ln_1.weight"], weights["ln_1.bias"])
        three = linear("attn.c_attn", hidden, width, 3 * width)
        query, key, value = split(three, 3)
        mixed = packed(context, query, key, value, self.heads, self.drop["attn"])
        del three, query, key, value
        mixed = linear("attn.c_proj", mixed, width, width)
        mixed = ops.dropout(mixed, self.drop["resid"], cuda)
        hidden = ops.add(mixed, residual)
        del mixed
        residual = hidden
        hidden = ops.layer_norm(hidden, width, weights["ln_2.weight"], weights["ln_2.bias"])
        hidden = linear("mlp.c_fc", hidden, width, self.wide)
        hidden = new_gelu(hidden)
        hidden = linear("mlp.c_proj", hidden, self.wide, width)
        return ops.add(residual, ops.dropout(hidden, self.drop["resid"], cuda))
