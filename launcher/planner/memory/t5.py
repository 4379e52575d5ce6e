"""Blocks of T5, mT5 and UMT5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.attention import fused, plain
from launcher.planner.memory.decoders import count, new_gelu
from launcher.planner.memory.encoders import Shapes, is_masked
from launcher.planner.memory.loss import cross_entropy
from launcher.planner.memory.program import Context, ShadowProgram, Unit, Weight, of_stack
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, checkpoint, new, node_of

BUCKET_BYTES = 53
"""Of each pair of positions while its bucket is sought: about six tensors of int64 and the smaller ones
between; a decoder's take 45."""


@dataclass
class _Biases:
    """What a stack adds to the scores of its attentions; layers of T5 share the first one's."""

    own: SymbolicTensor | None = None
    other: SymbolicTensor | None = None
    """Towards the encoder: zeros, of which nothing is learned."""


class T5(ShadowProgram):
    """T5, mT5 and UMT5: norms without a mean before each part, learned biases by relative position, no other
    positions.

    transformers 5.23 always ties the output matrix to the embeddings, whatever the config says. UMT5 has a
    bias in each layer.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.hidden: int = config["d_model"]
        self.inner: int = config["num_heads"] * config["d_kv"]
        self.heads: int = config["num_heads"]
        self.wide: int = config["d_ff"]
        layers: int = config["num_layers"]
        self.num_layers = {"encoder": layers, "decoder": config.get("num_decoder_layers") or layers}
        self.vocabulary: int = config["vocab_size"]
        self.buckets: int = config.get("relative_attention_num_buckets", 32)
        self.drop: float = config.get("dropout_rate", 0.1)
        self.kind: str = config.get("model_type", "t5")
        projection = config.get("feed_forward_proj", "relu" if self.kind == "t5" else "gated-gelu")
        self.gated = projection.startswith("gated-")
        self.activation = {"gated-gelu": "gelu_new"}.get(projection, projection.split("-")[-1])
        # Of T5 alone the config's own word about tying says whether the decoder's output is scaled; the
        # others always scale it.
        self.scales = self.kind != "t5" or config.get(
            "scale_decoder_outputs", config.get("tie_word_embeddings", True)
        )

    def layer_weights(self, side: str, index: int) -> Shapes:
        """Names within a layer, and shapes [out, in]."""
        found: Shapes = []
        for position, part in enumerate(("SelfAttention", "EncDecAttention")[: 1 + (side == "decoder")]):
            prefix = f"layer.{position}.{part}"
            found += [(f"{prefix}.{name}.weight", (self.inner, self.hidden)) for name in ("q", "k", "v")]
            found.append((f"{prefix}.o.weight", (self.hidden, self.inner)))
            if position == 0 and (index == 0 or self.kind == "umt5"):
                found.append((f"{prefix}.relative_attention_bias.weight", (self.buckets, self.heads)))
            found.append((f"layer.{position}.layer_norm.weight", (self.hidden,)))
        last = f"layer.{1 + (side == 'decoder')}"
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        found += [(f"{last}.DenseReluDense.{name}.weight", (self.wide, self.hidden)) for name in names]
        return [
            *found,
            (f"{last}.DenseReluDense.wo.weight", (self.hidden, self.wide)),
            (f"{last}.layer_norm.weight", (self.hidden,)),
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer, those of the encoder first."""
        layers = [
            Unit(
                tuple(
                    Weight(f"{side}.block.{i}.{name}", shape) for name, shape in self.layer_weights(side, i)
                )
            )
            for side in ("encoder", "decoder")
            for i in range(self.num_layers[side])
        ]
        # The encoder's norm stands between the two stacks; it counts as behind both.
        norms = [Weight(f"{side}.final_layer_norm.weight", (self.hidden,)) for side in ("encoder", "decoder")]
        return Unit((Weight("shared.weight", (self.vocabulary, self.hidden)), *norms), num_first=1), layers

    def forward(self, context: Context) -> SymbolicTensor:
        """Translation: padded sources, padded targets, chunked cross entropy."""
        setting = context.setting
        batch, sources, targets = (
            len(setting.batch.lengths),
            max(setting.batch.lengths),
            max(setting.batch.targets),
        )
        weights = {
            weight.name: context.parameter(weight.name, weight.num_elements)
            for weight in self.units()[0].weights
        }
        context.begin("stem")
        context.inputs = context.tensor(2 * batch * (sources + targets), 8)
        hidden = self._embedded(context, batch * sources, weights)
        masked = is_masked(context)
        mask = context.tensor(batch * sources * sources, 1) if masked else None
        encoded = self._stack(context, "encoder", hidden, None, (batch, sources, sources), mask)
        del hidden, mask
        context.begin("bridge")
        encoded = self._normed(context, encoded, weights["encoder.final_layer_norm.weight"])
        hidden = self._embedded(context, batch * targets, weights)
        mask = context.tensor(batch * sources * targets, 1) if masked else None
        hidden = self._stack(context, "decoder", hidden, encoded, (batch, targets, sources), mask)
        del mask
        context.begin("tail")
        hidden = self._normed(context, hidden, weights["decoder.final_layer_norm.weight"])
        if self.scales:
            hidden = ops.scale(hidden)
        return cross_entropy(
            context,
            hidden,
            self.hidden,
            self.vocabulary,
            sum(setting.batch.targets),
            weights["shared.weight"],
        )

    def _embedded(self, context: Context, tokens: int, weights: dict[str, Parameter]) -> SymbolicTensor:
        words = ops.embedding(
            context.inputs, tokens, self.hidden, context.setting.itemsize, weights["shared.weight"]
        )
        return ops.dropout(words, self._drop(context), context.setting.cuda)

    def _drop(self, context: Context) -> float:
        return self.drop if context.setting.training else 0.0

    def _normed(self, context: Context, hidden: SymbolicTensor, weight: Parameter) -> SymbolicTensor:
        """The norm behind a stack."""
        return ops.dropout(t5_norm(hidden, self.hidden, weight), self._drop(context), context.setting.cuda)

    def _stack(
        self,
        context: Context,
        side: str,
        hidden: SymbolicTensor,
        encoded: SymbolicTensor | None,
        sizes: tuple[int, int, int],
        mask: SymbolicTensor | None,
    ) -> SymbolicTensor:
        """All layers of a side, each of which is given the mask. `sizes`: samples, their positions, those of
        their sources."""
        first, biases = self.num_layers["encoder"] * (side == "decoder"), _Biases()
        for index in of_stack(context, self.num_layers[side], first):
            context.begin("layer", index)

            def layer(
                x: SymbolicTensor,
                y: SymbolicTensor | None,
                before: _Biases,
                _: SymbolicTensor | None,
                index: int = index,
            ) -> tuple[SymbolicTensor, _Biases]:
                return self._layer(context, side, index - first, x, y, before, sizes)

            hidden, biases = checkpoint(
                context.meter, context.setting.checkpointing, layer, hidden, encoded, biases, mask
            )
        return hidden

    def _layer(
        self,
        context: Context,
        side: str,
        index: int,
        hidden: SymbolicTensor,
        encoded: SymbolicTensor | None,
        before: _Biases,
        sizes: tuple[int, int, int],
    ) -> tuple[SymbolicTensor, _Biases]:
        prefix, (batch, length, sources) = f"{side}.block.{index}", sizes
        weights = {
            name: context.parameter(f"{prefix}.{name}", count(shape))
            for name, shape in self.layer_weights(side, index)
        }
        biases = _Biases(before.own, before.other)

        def own() -> SymbolicTensor:
            if biases.own is None:
                biases.own = self._bias(
                    context, length, weights["layer.0.SelfAttention.relative_attention_bias.weight"]
                )
            return biases.own

        def other() -> SymbolicTensor:
            if biases.other is None:
                biases.other = context.tensor(self.heads * length * sources)
            return biases.other

        hidden = self._attended(
            context, "layer.0", "SelfAttention", hidden, None, weights, own, (batch, length, length)
        )
        if encoded is not None:
            hidden = self._attended(
                context,
                "layer.1",
                "EncDecAttention",
                hidden,
                encoded,
                weights,
                other,
                (batch, length, sources),
            )
        hidden = self._fed_forward(context, f"layer.{1 if encoded is None else 2}", hidden, weights)
        return hidden, before if self.kind == "umt5" else biases

    def _bias(self, context: Context, length: int, weight: Parameter) -> SymbolicTensor:
        """`compute_bias`: [1, heads, length, length] of a table of buckets."""
        meter, pairs = context.meter, length * length
        meter.transient(BUCKET_BYTES * pairs)
        buckets = context.tensor(pairs, 8)
        size = context.setting.itemsize
        node = node_of(meter, (weight,), lambda gradient: [Storage(meter, weight.num_elements * size)])
        if node is not None:
            node.save(buckets.storage)
        return new(meter, pairs * self.heads, size, node)

    def _attended(
        self, context: Context, place: str, part: str, hidden: SymbolicTensor, source: SymbolicTensor | None,
        weights: dict[str, Parameter], bias: Callable[[], SymbolicTensor], sizes: tuple[int, int, int],
    ) -> SymbolicTensor:  # fmt: skip
        """A norm, an attention and its residual. The bias is made, where it is not there yet, after query,
        key and value."""
        cuda, residual = context.setting.cuda, hidden
        hidden = t5_norm(hidden, self.hidden, weights[f"{place}.layer_norm.weight"])
        of = {name: weights[f"{place}.{part}.{name}.weight"] for name in ("q", "k", "v", "o")}
        source = hidden if source is None else source
        query = ops.linear(hidden, self.hidden, self.inner, of["q"])
        key, value = (ops.linear(source, self.hidden, self.inner, of[name]) for name in ("k", "v"))
        mixed = self._mixed(context, part, query, key, value, bias(), sizes)
        mixed = ops.linear(mixed, self.inner, self.hidden, of["o"])
        del query, key, value
        return _clamped(ops.add(residual, ops.dropout(mixed, self._drop(context), cuda)), context)

    def _mixed(
        self,
        context: Context,
        part: str,
        query: SymbolicTensor,
        key: SymbolicTensor,
        value: SymbolicTensor,
        bias: SymbolicTensor,
        sizes: tuple[int, int, int],
    ) -> SymbolicTensor:
        """`sdpa_attention_forward` with a position bias: on a CPU what drops or learns goes through the plain
        one."""
        batch, num_queries, num_keys = sizes
        cuda, drop = context.setting.cuda, self._drop(context)
        added = self._masked(context, part, bias, sizes)
        if not cuda and (drop or added.needs_gradient):
            mixed = plain(
                query, key, value, batch * self.heads * num_queries * num_keys, batch, drop, cuda, added
            )
            return ops.copy(mixed) if num_queries > 1 and self.heads > 1 else mixed
        return fused(query, key, value, self.heads * batch, num_queries, bias=added)

    def _masked(
        self, context: Context, part: str, bias: SymbolicTensor, sizes: tuple[int, int, int]
    ) -> SymbolicTensor:
        """`create_position_bias_mask`: the bias with what may not be seen taken out, in memory of its own."""
        batch, num_queries, num_keys = sizes
        causal = part == "SelfAttention" and context.segments[-1].layer >= self.num_layers["encoder"]
        if causal:
            seen = context.tensor(num_queries * num_keys, 1)
            return _where(seen, bias, bias.num_elements)
        if is_masked(context):
            return _where(None, bias, batch * bias.num_elements)
        return ops.copy(bias) if part == "SelfAttention" else bias

    def _fed_forward(
        self, context: Context, place: str, hidden: SymbolicTensor, weights: dict[str, Parameter]
    ) -> SymbolicTensor:
        cuda, residual = context.setting.cuda, hidden
        of = {
            name.split(".")[-2]: weight
            for name, weight in weights.items()
            if name.startswith(f"{place}.DenseReluDense.")
        }
        hidden = t5_norm(hidden, self.hidden, weights[f"{place}.layer_norm.weight"])
        if self.gated:
            first = self._active(ops.linear(hidden, self.hidden, self.wide, of["wi_0"]))
            second = ops.linear(hidden, self.hidden, self.wide, of["wi_1"])
            wide = ops.multiply(first, second)
            del first, second
        else:
            wide = self._active(ops.linear(hidden, self.hidden, self.wide, of["wi"]))
        wide = ops.dropout(wide, self._drop(context), cuda)
        result = ops.linear(wide, self.wide, self.hidden, of["wo"])
        return _clamped(ops.add(residual, ops.dropout(result, self._drop(context), cuda)), context)

    def _active(self, x: SymbolicTensor) -> SymbolicTensor:
        if self.activation == "gelu_new":
            return new_gelu(x)
        return ops.pointwise(x, "output" if self.activation == "relu" else "input")


def t5_norm(x: SymbolicTensor, width: int, weight: Parameter) -> SymbolicTensor:
    """T5LayerNorm: the variance in fp32, and the product with it of what came in, which is kept as it is."""
    rows = x.num_elements // width
    square = ops.pointwise(ops.cast(x, 4), "input", temporaries=1)
    mean = ops.scale(ops.pointwise(square, "nothing", num_elements=rows))
    del square
    root = ops.pointwise(mean, "output")
    del mean
    scaled = ops.multiply(x, root)
    return ops.multiply_parameter(weight, ops.cast(scaled, x.itemsize))


def _where(seen: SymbolicTensor | None, bias: SymbolicTensor, num_elements: int) -> SymbolicTensor:
    """`torch.where(seen, bias, least)`: it keeps the mask; its gradient is summed over the samples where the
    bias is one for all."""
    meter, own = bias.meter, bias.num_elements * bias.itemsize
    node = node_of(
        meter,
        (bias,),
        lambda gradient: [
            Storage(meter, gradient.num_bytes) if gradient.num_bytes <= own else summed(gradient)
        ],
    )

    def summed(gradient: Storage) -> Storage:
        _of_all = Storage(meter, gradient.num_bytes)
        return Storage(meter, own)

    if node is not None and seen is not None:
        node.save(seen.storage)
    return new(meter, num_elements, bias.itemsize, node)


def _clamped(x: SymbolicTensor, context: Context) -> SymbolicTensor:
    """Infinities of fp16 taken back: with limits that are tensors, which keeps what came in."""
    return ops.pointwise(x, "input") if context.setting.half else x
