"""Blocks of the encoder-decoder BART."""

from __future__ import annotations

from typing import Any

from launcher.planner.memory import operators as ops
from launcher.planner.memory.decoders import count
from launcher.planner.memory.encoders import Shapes, attend, dense, is_masked, norm
from launcher.planner.memory.loss import cross_entropy
from launcher.planner.memory.program import Context, ShadowProgram, Unit, Weight, of_stack
from launcher.planner.memory.symbolic import Parameter, SymbolicTensor, checkpoint


class Bart(ShadowProgram):
    """BART: learned positions, norms after each part, one table of embeddings for all."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.hidden: int = config["d_model"]
        self.num_layers = {"encoder": config["encoder_layers"], "decoder": config["decoder_layers"]}
        self.wide = {"encoder": config["encoder_ffn_dim"], "decoder": config["decoder_ffn_dim"]}
        self.heads = {
            "encoder": config["encoder_attention_heads"],
            "decoder": config["decoder_attention_heads"],
        }
        self.vocabulary: int = config["vocab_size"]
        self.positions: int = config["max_position_embeddings"] + 2
        self.drop: float = config.get("dropout", 0.1)
        self.drop_attention: float = config.get("attention_dropout", 0.0)
        self.drop_activation: float = config.get("activation_dropout", 0.0)

    def layer_weights(self, side: str) -> Shapes:
        found: Shapes = []
        parts = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}[side]
        for part in parts:
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                found += dense(f"{part}.{name}", self.hidden, self.hidden)
            found += norm(f"{part}_layer_norm", self.hidden)
        found += [*dense("fc1", self.wide[side], self.hidden), *dense("fc2", self.hidden, self.wide[side])]
        return [*found, *norm("final_layer_norm", self.hidden)]

    def units(self) -> tuple[Unit, list[Unit]]:
        """What is outside of the layers, and each layer, those of the encoder first."""
        layers = [
            Unit(
                tuple(
                    Weight(f"model.{side}.layers.{i}.{name}", shape)
                    for name, shape in self.layer_weights(side)
                )
            )
            for side in ("encoder", "decoder")
            for i in range(self.num_layers[side])
        ]
        rest: Shapes = [("model.shared.weight", (self.vocabulary, self.hidden))]
        for side in ("encoder", "decoder"):
            rest.append((f"model.{side}.embed_positions.weight", (self.positions, self.hidden)))
            rest += norm(f"model.{side}.layernorm_embedding", self.hidden)
        # The decoder's own stand between the two stacks; they count as behind both.
        return Unit(tuple(Weight(name, shape) for name, shape in rest), num_first=4), layers

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
        encoded = self._embedded(context, "encoder", batch, sources, weights)
        masked = is_masked(context)
        mask = context.tensor(batch * sources * sources, 1) if masked else None
        for index in of_stack(context, self.num_layers["encoder"]):
            context.begin("layer", index)
            encoded = checkpoint(
                context.meter, setting.checkpointing,
                lambda x, _, i=index: self._encode(context, i, x, batch, sources), encoded, mask,
            )  # fmt: skip
        del mask
        context.begin("bridge")
        hidden = self._embedded(context, "decoder", batch, targets, weights)
        mask = context.tensor(batch * sources * targets, 1) if masked else None
        first = self.num_layers["encoder"]
        for index in of_stack(context, self.num_layers["decoder"], first):
            context.begin("layer", index)
            hidden = checkpoint(
                context.meter, setting.checkpointing,
                lambda x, y, _, i=index - first: self._decode(context, i, x, y, batch, targets, sources),
                hidden, encoded, mask,
            )  # fmt: skip
        del mask
        context.begin("tail")
        supervised = sum(setting.batch.targets)
        return cross_entropy(
            context, hidden, self.hidden, self.vocabulary, supervised, weights["model.shared.weight"]
        )

    def _embedded(
        self, context: Context, side: str, batch: int, length: int, weights: dict[str, Parameter]
    ) -> SymbolicTensor:
        tokens, size = batch * length, context.setting.itemsize
        assert context.inputs is not None
        words = ops.scale(
            ops.embedding(context.inputs, tokens, self.hidden, size, weights["model.shared.weight"])
        )
        places = ops.embedding(
            context.inputs, tokens, self.hidden, size, weights[f"model.{side}.embed_positions.weight"]
        )
        hidden = ops.add(words, places)
        name = f"model.{side}.layernorm_embedding"
        hidden = ops.layer_norm(hidden, self.hidden, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return ops.dropout(hidden, self.drop, context.setting.cuda)

    def _weights(self, context: Context, side: str, index: int) -> dict[str, Parameter]:
        prefix = f"model.{side}.layers.{index}"
        return {
            name: context.parameter(f"{prefix}.{name}", count(shape))
            for name, shape in self.layer_weights(side)
        }

    def _encode(
        self, context: Context, index: int, hidden: SymbolicTensor, batch: int, length: int
    ) -> SymbolicTensor:
        weights = self._weights(context, "encoder", index)
        hidden = self._attended(
            context,
            "encoder",
            "self_attn",
            hidden,
            hidden,
            weights,
            (batch, length, length),
            is_masked(context),
        )
        return self._fed_forward(context, hidden, weights, self.wide["encoder"])

    def _decode(
        self,
        context: Context,
        index: int,
        hidden: SymbolicTensor,
        encoded: SymbolicTensor,
        batch: int,
        length: int,
        sources: int,
    ) -> SymbolicTensor:
        weights = self._weights(context, "decoder", index)
        hidden = self._attended(
            context, "decoder", "self_attn", hidden, hidden, weights, (batch, length, length), False
        )
        hidden = self._attended(
            context,
            "decoder",
            "encoder_attn",
            hidden,
            encoded,
            weights,
            (batch, length, sources),
            is_masked(context),
        )
        return self._fed_forward(context, hidden, weights, self.wide["decoder"])

    def _attended(
        self, context: Context, side: str, part: str, hidden: SymbolicTensor, source: SymbolicTensor,
        weights: dict[str, Parameter], sizes: tuple[int, int, int], masked: bool,
    ) -> SymbolicTensor:  # fmt: skip
        """An attention with its residual and its norm."""
        width = self.hidden
        query = ops.linear(
            hidden, width, width, weights[f"{part}.q_proj.weight"], weights[f"{part}.q_proj.bias"]
        )
        key = ops.linear(
            source, width, width, weights[f"{part}.k_proj.weight"], weights[f"{part}.k_proj.bias"]
        )
        value = ops.linear(
            source, width, width, weights[f"{part}.v_proj.weight"], weights[f"{part}.v_proj.bias"]
        )
        mixed = attend(context, query, key, value, self.heads[side], *sizes, self.drop_attention, masked)
        del query, key, value
        mixed = ops.linear(
            mixed, width, width, weights[f"{part}.out_proj.weight"], weights[f"{part}.out_proj.bias"]
        )
        mixed = ops.add(hidden, ops.dropout(mixed, self.drop, context.setting.cuda))
        return ops.layer_norm(
            mixed, width, weights[f"{part}_layer_norm.weight"], weights[f"{part}_layer_norm.bias"]
        )

    def _fed_forward(
        self, context: Context, hidden: SymbolicTensor, weights: dict[str, Parameter], wide: int
    ) -> SymbolicTensor:
        residual, cuda = hidden, context.setting.cuda
        hidden = ops.pointwise(
            ops.linear(hidden, self.hidden, wide, weights["fc1.weight"], weights["fc1.bias"])
        )
        hidden = ops.dropout(hidden, self.drop_activation, cuda)
        hidden = ops.linear(hidden, wide, self.hidden, weights["fc2.weight"], weights["fc2.bias"])
        hidden = ops.add(residual, ops.dropout(hidden, self.drop, cuda))
        return ops.layer_norm(
            hidden, self.hidden, weights["final_layer_norm.weight"], weights["final_layer_norm.bias"]
        )
