"""Blocks of the text encoders BERT and RoBERTa."""

from __future__ import annotations

from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.attention import fused, plain
from launcher.planner.memory.decoders import count
from launcher.planner.memory.program import Context, ShadowProgram, Unit, Weight, of_stack
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, checkpoint, new, node_of

Shapes = list[tuple[str, tuple[int, ...]]]


def dense(name: str, num_out: int, num_in: int) -> Shapes:
    return [(f"{name}.weight", (num_out, num_in)), (f"{name}.bias", (num_out,))]


def norm(name: str, width: int) -> Shapes:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def first_token(hidden: SymbolicTensor, batch: int, width: int) -> SymbolicTensor:
    """`hidden[:, 0]`: a view; its gradient is as large as what it was taken from."""
    meter, size, total = hidden.meter, hidden.itemsize, hidden.num_elements
    node = node_of(meter, (hidden,), lambda gradient: [Storage(meter, total * size)])
    return SymbolicTensor(batch * width, size, hidden.storage, node)


def classified(logits: SymbolicTensor) -> SymbolicTensor:
    """The loss of `heads.sequence_classification`: a few numbers of each sample."""
    meter, num_bytes = logits.meter, logits.num_elements * logits.itemsize
    node = node_of(meter, (logits,), lambda gradient: [Storage(meter, num_bytes)])
    return new(meter, 1, 4, node)


class Bert(ShadowProgram):
    """BERT and RoBERTa: learned positions, norms after each part, biases everywhere."""

    def __init__(self, config: dict[str, Any], num_labels: int) -> None:
        self.hidden: int = config["hidden_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.wide: int = config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.vocabulary: int = config["vocab_size"]
        self.positions: int = config["max_position_embeddings"]
        self.types: int = config.get("type_vocab_size", 2)
        self.drop: float = config.get("hidden_dropout_prob", 0.1)
        self.drop_attention: float = config.get("attention_probs_dropout_prob", 0.1)
        self.kind: str = config.get("model_type", "bert")
        self.num_labels = num_labels

    def stem_weights(self) -> Shapes:
        found: Shapes = [
            ("word_embeddings.weight", (self.vocabulary, self.hidden)),
            ("position_embeddings.weight", (self.positions, self.hidden)),
        ]
        found += [
            ("token_type_embeddings.weight", (self.types, self.hidden)),
            *norm("LayerNorm", self.hidden),
        ]
        return [(f"{self.kind}.embeddings.{name}", shape) for name, shape in found]

    def layer_weights(self) -> Shapes:
        hidden, wide = self.hidden, self.wide
        found: Shapes = []
        for name in ("query", "key", "value"):
            found += dense(f"attention.self.{name}", hidden, hidden)
        found += [
            *dense("attention.output.dense", hidden, hidden),
            *norm("attention.output.LayerNorm", hidden),
        ]
        found += [
            *dense("intermediate.dense", wide, hidden),
            *dense("output.dense", hidden, wide),
            *norm("output.LayerNorm", hidden),
        ]
        return found

    def tail_weights(self) -> Shapes:
        if self.kind == "roberta":
            return [
                *dense("classifier.dense", self.hidden, self.hidden),
                *dense("classifier.out_proj", self.num_labels, self.hidden),
            ]
        return [
            *dense("bert.pooler.dense", self.hidden, self.hidden),
            *dense("classifier", self.num_labels, self.hidden),
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""
        layers = [
            Unit(
                tuple(
                    Weight(f"{self.kind}.encoder.layer.{i}.{name}", shape)
                    for name, shape in self.layer_weights()
                )
            )
            for i in range(self.num_layers)
        ]
        stem = self.stem_weights()
        return Unit(
            tuple(Weight(name, shape) for name, shape in [*stem, *self.tail_weights()]), num_first=len(stem)
        ), layers

    def forward(self, context: Context) -> SymbolicTensor:
        """Sequence classification over padded samples."""
        setting = context.setting
        batch, size, tokens = setting.batch, setting.itemsize, setting.batch.num_tokens
        context.begin("stem")
        weights = {
            name.removeprefix(f"{self.kind}.embeddings."): context.parameter(name, count(shape))
            for name, shape in self.stem_weights()
        }
        ids = context.tensor(2 * tokens, 8)
        words = ops.embedding(ids, tokens, self.hidden, size, weights["word_embeddings.weight"])
        types = ops.embedding(ids, tokens, self.hidden, size, weights["token_type_embeddings.weight"])
        hidden = ops.add(words, types)
        places = ops.embedding(
            ids,
            tokens if self.kind == "roberta" else max(batch.lengths),
            self.hidden,
            size,
            weights["position_embeddings.weight"],
        )
        hidden = added_broadcast(hidden, places)
        del words, types, places
        hidden = ops.layer_norm(hidden, self.hidden, weights["LayerNorm.weight"], weights["LayerNorm.bias"])
        hidden = ops.dropout(hidden, self.drop, setting.cuda)
        mask = attention_mask(context)
        # the model's own variable, until its layers are done: of frozen layers nothing else would keep it
        embedded = hidden
        for index in of_stack(context, self.num_layers):
            context.begin("layer", index)
            hidden = checkpoint(
                context.meter,
                setting.checkpointing,
                lambda x, _, i=index: self.layer(context, i, x),
                hidden,
                mask,
            )
        context.begin("tail")
        del embedded
        result = self.head(context, hidden)
        del mask
        return result

    def head(self, context: Context, hidden: SymbolicTensor) -> SymbolicTensor:
        first, second = [name.rsplit(".", 1)[0] for name, _ in self.tail_weights()[::2]]
        batch, cuda = len(context.setting.batch.lengths), context.setting.cuda
        shapes = dict(self.tail_weights())
        weight = {name: context.parameter(name, count(shape)) for name, shape in shapes.items()}
        pooled = first_token(hidden, batch, self.hidden)
        pooled = ops.linear(
            pooled, self.hidden, self.hidden, weight[f"{first}.weight"], weight[f"{first}.bias"]
        )
        pooled = ops.dropout(ops.pointwise(pooled, "output"), self.drop, cuda)
        return classified(
            ops.linear(
                pooled, self.hidden, self.num_labels, weight[f"{second}.weight"], weight[f"{second}.bias"]
            )
        )

    def layer(self, context: Context, index: int, hidden: SymbolicTensor) -> SymbolicTensor:
        """[samples x length, hidden] -> the same."""
        setting = context.setting
        weights = {
            name: context.parameter(f"{self.kind}.encoder.layer.{index}.{name}", count(shape))
            for name, shape in self.layer_weights()
        }
        mixed = self_attention(
            context,
            hidden,
            self.hidden,
            self.heads,
            weights,
            "attention.self.{}",
            ("query", "key", "value"),
            self.drop_attention,
        )
        mixed = ops.linear(
            mixed,
            self.hidden,
            self.hidden,
            weights["attention.output.dense.weight"],
            weights["attention.output.dense.bias"],
        )
        mixed = ops.dropout(mixed, self.drop, setting.cuda)
        hidden = self._normed(ops.add(mixed, hidden), weights, "attention.output.LayerNorm")
        del mixed
        wide = ops.linear(
            hidden,
            self.hidden,
            self.wide,
            weights["intermediate.dense.weight"],
            weights["intermediate.dense.bias"],
        )
        wide = ops.pointwise(wide)
        wide = ops.linear(
            wide, self.wide, self.hidden, weights["output.dense.weight"], weights["output.dense.bias"]
        )
        wide = ops.dropout(wide, self.drop, setting.cuda)
        return self._normed(ops.add(wide, hidden), weights, "output.LayerNorm")

    def _normed(self, hidden: SymbolicTensor, weights: dict[str, Parameter], name: str) -> SymbolicTensor:
        return ops.layer_norm(hidden, self.hidden, weights[f"{name}.weight"], weights[f"{name}.bias"])


def added_broadcast(hidden: SymbolicTensor, part: SymbolicTensor) -> SymbolicTensor:
    """Something smaller added to each sample; its gradient is summed."""
    meter, own, size = hidden.meter, part.num_elements, hidden.itemsize

    def gradients(gradient: Storage) -> list[Storage | None]:
        return [gradient, gradient if own * size == gradient.num_bytes else Storage(meter, own * size)]

    node = node_of(meter, (hidden, part), gradients)
    return new(meter, hidden.num_elements, size, node)


def is_masked(context: Context) -> bool:
    """Whether any sample is shorter than the longest; transformers leaves a mask of ones out."""
    lengths = context.setting.batch.lengths
    return min(lengths) < max(lengths)


def attention_mask(context: Context) -> SymbolicTensor | None:
    """bool [samples, 1, length, length], once for all layers."""
    lengths = context.setting.batch.lengths
    return context.tensor(len(lengths) * max(lengths) ** 2, 1) if is_masked(context) else None


def self_attention(
    context: Context,
    hidden: SymbolicTensor,
    width: int,
    heads: int,
    weights: dict[str, Parameter],
    pattern: str,
    names: tuple[str, str, str],
    drop: float,
) -> SymbolicTensor:
    """Query, key and value of one input, each with a bias, through PyTorch's fused attention."""
    made = []
    for name in names:
        path = pattern.format(name)
        made.append(ops.linear(hidden, width, width, weights[f"{path}.weight"], weights.get(f"{path}.bias")))
    query, key, value = made
    made.clear()
    lengths = context.setting.batch.lengths
    batch, length = len(lengths), max(lengths)
    return attend(context, query, key, value, heads, batch, length, length, drop, is_masked(context))


def attend(
    context: Context,
    query: SymbolicTensor,
    key: SymbolicTensor,
    value: SymbolicTensor,
    heads: int,
    batch: int,
    num_queries: int,
    num_keys: int,
    drop: float,
    masked: bool,
) -> SymbolicTensor:
    """`sdpa_attention_forward`: the fused kernel, or on a CPU with dropout the plain one."""
    cuda = context.setting.cuda
    if not context.setting.training:
        drop = 0.0
    if drop and not cuda:
        mask = context.tensor(batch * num_queries * num_keys, query.itemsize) if masked else None
        mixed = plain(query, key, value, batch * heads * num_queries * num_keys, batch, drop, cuda, None)
        del mask
        return ops.copy(mixed) if num_queries > 1 and heads > 1 else mixed
    return fused(
        query, key, value, heads * batch, num_queries, batch * num_queries * num_keys if masked else 0
    )
