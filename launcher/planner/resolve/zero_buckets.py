"""Choose ZeRO's communication sizes from the model, in elements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.planner.model.model_shape import ModelShape

_LEAST, _MOST = 1 << 20, 500_000_000
"""Bounds. Below the first, a message's latency exceeds its transfer; the second is DeepSpeed's default bucket
size (0.19)."""


@dataclass(frozen=True)
class Buckets:
    """Sizes for `Zero` in the plan."""

    reduce_bucket_size: int
    allgather_bucket_size: int
    prefetch_bucket_size: int
    persistence_threshold: int
    max_live_parameters: int
    sub_group_size: int
    largest_parameter: int = 0
    """Upper bound of any parameter's size, set only if parameters are in files; else 0."""

    @classmethod
    def of(
        cls, shape: ModelShape | None, offloads_to_files: bool, parameters_on_files: bool = False
    ) -> tuple[Buckets, dict[str, str]]:
        """Return the sizes for a model, and the reason for each by its name."""
        if shape is None:
            unknown = "DeepSpeed's own default, as the model's size is not known before it is fetched"
            sizes = cls(_MOST, _MOST, 50_000_000, 100_000, 1_000_000_000, 100_000_000)
            return sizes, {name: unknown for name in cls.__annotations__ if name != "largest_parameter"}
        layer = shape.layer_parameters
        bucket = min(_MOST, max(_LEAST, layer))
        embeddings = max(0, shape.num_parameters - layer * shape.num_layers)
        sizes = cls(
            reduce_bucket_size=bucket,
            allgather_bucket_size=bucket,
            prefetch_bucket_size=bucket,
            persistence_threshold=10 * shape.hidden_size,
            max_live_parameters=max(_LEAST, embeddings + 3 * layer),
            sub_group_size=max(_LEAST, layer),
        )
        swapped = "one layer: what is read, stepped and written in one go"
        stepped = "one layer: the gradients of what is stepped in one go are copied for it"
        reasons = {
            "reduce_bucket_size": f"one layer ({layer:,}): sent while the next one is computed",
            "allgather_bucket_size": f"one layer ({layer:,}) at a time after a step",
            "prefetch_bucket_size": f"one layer ({layer:,}): gathered while the one before is computed",
            "persistence_threshold": "10 x hidden: norms and biases stay whole, as gathering "
            "them costs more than holding "
            "them",
            "max_live_parameters": "embeddings and three layers: the one in use, its "
            "neighbour, and one on the way",
            "sub_group_size": swapped if offloads_to_files else stepped,
        }
        if parameters_on_files:
            sizes = replace(
                sizes, prefetch_bucket_size=0, largest_parameter=max(shape.table_parameters, layer)
            )
            reasons["largest_parameter"] = (
                "a table of embeddings, or at most a whole layer: what the ranks' buffers for files "
                "hold together"
            )
            reasons["prefetch_bucket_size"] = (
                "nothing ahead: each parameter in use takes one of the few buffers that files are read into"
            )
        return sizes, reasons
