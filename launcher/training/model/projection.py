"""A matrix that maps a student's hidden states to its teacher's width, if the widths differ.

It is trained, sharded, saved and resumed with the student, but not exported.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from launcher.planner.plan import Plan
from launcher.tasks.distillation import PROJECTION
from launcher.training.model import pretrained


class _Projected:
    """A mixin, before a model's class, that adds the projection."""

    width_of_teacher: int

    def __init__(self, config: Any, *args: Any, **named: Any) -> None:
        super().__init__(config, *args, **named)  # type: ignore[call-arg]
        hidden = config.get_text_config().hidden_size
        setattr(self, PROJECTION, nn.Linear(hidden, self.width_of_teacher, bias=False))


def projected(kind: type[PreTrainedModel], config: Any, plan: Plan) -> type[PreTrainedModel]:
    """Return a model's class, with a projection if its plan compares hidden states of another width.

    Raises ConfigurationError if the teacher's config cannot be read.
    """
    if plan.distillation is None or plan.distillation.hidden_states is None:
        return kind
    width = pretrained.read_config(plan.of_teacher()).get_text_config().hidden_size
    return kind if width == config.get_text_config().hidden_size else _class_with_projection(kind, width)


def _class_with_projection(kind: type[PreTrainedModel], width: int) -> type[PreTrainedModel]:
    # transformers finds a class's loss, and a config's `architectures`, by this name.
    own = {"__module__": kind.__module__, "width_of_teacher": width}
    return cast(type[PreTrainedModel], type(kind.__name__, (_Projected, kind), own))
