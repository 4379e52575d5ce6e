"""Blocks of the vision encoder ViT."""

from __future__ import annotations

from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.decoders import count
from launcher.planner.memory.encoders import Shapes, attend, classified, dense, first_token, norm
from launcher.planner.memory.program import Context, ShadowProgram, Unit, Weight, of_stack
from launcher.planner.memory.symbolic import Parameter, Storage, SymbolicTensor, checkpoint, new, node_of


class Vit(ShadowProgram):
    """ViT: patches of an image, norms before each part."""

    def __init__(self, config: dict[str, Any], num_labels: int) -> None:
        self.hidden: int = config["hidden_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.wide: int = config["intermediate_size"]
        self.heads: int = config["num_attention_heads"]
        self.image, self.patch, self.channels = (
            config["image_size"],
            config["patch_size"],
            config["num_channels"],
        )
        self.tokens = (self.image // self.patch) ** 2 + 1
        self.drop: float = config.get("hidden_dropout_prob", 0.0)
        self.drop_attention: float = config.get("attention_probs_dropout_prob", 0.0)
        self.num_labels = num_labels

    def layer_weights(self) -> Shapes:
        found: Shapes = []
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found += dense(f"attention.{name}", self.hidden, self.hidden)
        found += [*norm("layernorm_before", self.hidden), *norm("layernorm_after", self.hidden)]
        return [*found, *dense("mlp.fc1", self.wide, self.hidden), *dense("mlp.fc2", self.hidden, self.wide)]

    def stem_weights(self) -> Shapes:
        """Those of the unit of embeddings, whose class ViT names as not to be split."""
        patch = "patch_embeddings.projection"
        found: Shapes = [
            ("cls_token", (1, 1, self.hidden)),
            ("position_embeddings", (1, self.tokens, self.hidden)),
        ]
        return [
            *found,
            (f"{patch}.weight", (self.hidden, self.channels, self.patch, self.patch)),
            (f"{patch}.bias", (self.hidden,)),
        ]

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer."""
        layers = [
            Unit(tuple(Weight(f"vit.layers.{i}.{name}", shape) for name, shape in self.layer_weights()))
            for i in range(self.num_layers)
        ]
        rest = [(f"vit.embeddings.{name}", shape) for name, shape in self.stem_weights()]
        num_first = len(rest)
        rest += [*norm("vit.layernorm", self.hidden), *dense("classifier", self.num_labels, self.hidden)]
        return Unit(tuple(Weight(name, shape) for name, shape in rest), num_first), layers

    def forward(self, context: Context) -> SymbolicTensor:
        """Image classification."""
        setting = context.setting
        batch, size = len(setting.batch.lengths), setting.itemsize
        weights = {
            name: context.parameter(name, count(shape))
            for name, shape in ((w.name, w.shape) for w in self.units()[0].weights)
        }
        context.begin("stem")
        given = context.tensor(batch * self.channels * self.image**2, 4)
        pixels = given if size == 4 else context.tensor(given.num_elements)
        patches = self._convolved(pixels, batch, weights)
        del pixels
        joined = new(
            context.meter,
            batch * self.tokens * self.hidden,
            size,
            node_of(
                context.meter, (patches, weights["vit.embeddings.cls_token"]), self._split(context, batch)
            ),
        )
        del patches
        places = context.parameter("vit.embeddings.position_embeddings", self.tokens * self.hidden)
        hidden = _with_places(joined, places)
        del joined
        hidden = ops.dropout(hidden, self.drop, setting.cuda)
        for index in of_stack(context, self.num_layers):
            context.begin("layer", index)
            hidden = checkpoint(
                context.meter,
                setting.checkpointing,
                lambda x, i=index: self.layer(context, i, x, batch),
                hidden,
            )
        context.begin("tail")
        hidden = ops.layer_norm(
            hidden, self.hidden, weights["vit.layernorm.weight"], weights["vit.layernorm.bias"]
        )
        pooled = first_token(hidden, batch, self.hidden)
        result = classified(
            ops.linear(
                pooled, self.hidden, self.num_labels, weights["classifier.weight"], weights["classifier.bias"]
            )
        )
        context.inputs = given
        return result

    def _split(self, context: Context, batch: int) -> Any:
        """The gradient of a concatenation is two views of it; that of the class token is then summed over the
        samples."""
        meter, size = context.meter, context.setting.itemsize
        return lambda gradient: [gradient, Storage(meter, self.hidden * size)]

    def _convolved(self, pixels: SymbolicTensor, batch: int, weights: dict[str, Parameter]) -> SymbolicTensor:
        weight, bias = (
            weights[f"vit.embeddings.patch_embeddings.projection.{name}"] for name in ("weight", "bias")
        )
        meter, size = pixels.meter, pixels.itemsize
        node = node_of(
            meter,
            (weight, bias),
            lambda gradient: [
                Storage(meter, weight.num_elements * size),
                Storage(meter, bias.num_elements * size),
            ],
        )
        if node is not None:
            node.save(pixels.storage)
        return new(meter, batch * (self.tokens - 1) * self.hidden, size, node)

    def layer(self, context: Context, index: int, hidden: SymbolicTensor, batch: int) -> SymbolicTensor:
        """[images x patches, hidden] -> the same."""
        cuda = context.setting.cuda
        weights = {
            name: context.parameter(f"vit.layers.{index}.{name}", count(shape))
            for name, shape in self.layer_weights()
        }
        residual = hidden
        hidden = ops.layer_norm(
            hidden, self.hidden, weights["layernorm_before.weight"], weights["layernorm_before.bias"]
        )
        query, key, value = (
            ops.linear(
                hidden,
                self.hidden,
                self.hidden,
                weights[f"attention.{name}.weight"],
                weights[f"attention.{name}.bias"],
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attend(
            context,
            query,
            key,
            value,
            self.heads,
            batch,
            self.tokens,
            self.tokens,
            self.drop_attention,
            False,
        )
        del query, key, value
        hidden = ops.linear(
            mixed,
            self.hidden,
            self.hidden,
            weights["attention.o_proj.weight"],
            weights["attention.o_proj.bias"],
        )
        del mixed
        hidden = ops.add(ops.dropout(hidden, self.drop, cuda), residual)
        residual = hidden
        hidden = ops.layer_norm(
            hidden, self.hidden, weights["layernorm_after.weight"], weights["layernorm_after.bias"]
        )
        hidden = ops.linear(
            hidden, self.hidden, self.wide, weights["mlp.fc1.weight"], weights["mlp.fc1.bias"]
        )
        hidden = ops.pointwise(hidden)
        hidden = ops.linear(
            hidden, self.wide, self.hidden, weights["mlp.fc2.weight"], weights["mlp.fc2.bias"]
        )
        return ops.add(ops.dropout(hidden, self.drop, cuda), residual)


def _with_places(hidden: SymbolicTensor, places: Parameter) -> SymbolicTensor:
    meter, size = hidden.meter, hidden.itemsize
    node = node_of(
        meter, (hidden, places), lambda gradient: [gradient, Storage(meter, places.num_elements * size)]
    )
    return new(meter, hidden.num_elements, size, node)


__all__ = ["Vit"]
