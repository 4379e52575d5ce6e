"""The block profile of a plan's model, made in a separate process.

`python -m launcher.training.tracing.make_profile OUT` reads the plan on stdin.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.planner.limits import chunk_length
from launcher.planner.memory.profile import FEW, MANY, RECOMPUTATIONS, Block, Pass, Profile
from launcher.planner.plan import Plan
from launcher.tasks.task import IGNORE, Draws, Sample, Task
from launcher.training import cpu_half_matmul
from launcher.training.devices import to_device
from launcher.training.model import normalization, pretrained
from launcher.training.model.forward import output_embeddings_of
from launcher.training.precision import DTYPES
from launcher.training.tracing.layers import Layer, spread
from launcher.training.tracing.recorder import Passed, joined, same
from launcher.training.tracing.traced_model import TracedModel, Untraceable

_MOST_SAMPLES = 64
"""The most samples of a pass in which a chunked loss is traced; beyond, its memory is extrapolated, which is
never too low."""
_CHUNKS = (1, 2, 3)
"""The numbers of chunks of a loss that differ in memory; more chunks need no more."""


class ProfileMaker:
    """A plan's model and task, for tracing."""

    def __init__(self, plan: Plan) -> None:
        """Build the model without values. Raises ConfigurationError if its class cannot be built, or cannot
        do the task."""
        if plan.mesh.device == "cpu":
            # Kernels are run to measure their memory, and ranks run them so.
            cpu_half_matmul.widen(DTYPES[plan.precision])
        # flash-attn's kernel runs only on a GPU; PyTorch's own saves the same tensors.
        self.plan = (
            plan.model_copy(update={"attention": "sdpa"}) if plan.attention == "flash_attention_2" else plan
        )
        self.config = config = pretrained.read_config(self.plan)
        self.task = prepared_task(self.plan, config)
        kind = pretrained.model_class(self.task.auto_class, config, plan)
        self._classes_of_files = tuple(config.architectures or ())
        # For a type with two classes transformers selects the one that a config names.
        config.architectures = config.architectures or [kind.__name__]
        options = {"trust_remote_code": plan.model.trust_remote_code}
        self.traced = TracedModel(
            config, self.task.auto_class, self.task.loss, DTYPES[plan.precision], **options
        )

    def profile(self) -> Profile:
        """Return the profile; without passes, but with the reason, if the model's code does not run without
        values.

        Raises ConfigurationError for patterns that match nothing, and for a model without repeated layers.
        """
        from launcher.training.model.places import freeze

        adapter = self.plan.model.adapter
        if adapter is None:
            freeze(self.traced.model, self.plan.model)
            if self.plan.model.freeze_normalization:
                normalization.freeze(self.traced.model, self.plan.model.name)
        else:
            self.traced.add_adapter(adapter, self._new_parameters)
        root, layers = self.traced.units(narrow=adapter is not None)
        length = self.plan.data.max_length
        try:
            return self._with_passes(Profile(length, root, tuple(layers)))
        except Untraceable as error:
            return Profile(length, root, tuple(layers), untraceable=str(error))

    def _new_parameters(self, model: Any) -> tuple[str, ...]:
        """Return the parameters that are not in the model's files: its head's, if the files are of another
        class or say so."""
        if self.plan.model.weights == "random":
            return ()
        inside = (
            {id(parameter) for parameter in model.base_model.parameters()}
            if model.base_model is not model
            else None
        )
        if inside is None:
            return ()
        head = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
        if not self._classes_of_files and output_embeddings_of(model) is not None:
            return ()  # the config names no class; a language model's files have its head
        return tuple(head) if type(model).__name__ not in self._classes_of_files else ()

    def _with_passes(self, profile: Profile) -> Profile:
        """Return the profile with its passes. If skipping layers fails, all are traced."""
        layers = self.traced.layers()
        try:
            return self._gone_through(profile, layers)
        except (ValueError, Untraceable) as error:
            if all(layer.traced for layer in layers):
                raise Untraceable(str(error)) from None
        try:
            return self._gone_through(profile, self.traced.layers(every=True))
        except ValueError as error:
            raise Untraceable(str(error)) from None

    def _gone_through(self, profile: Profile, layers: Sequence[Layer]) -> Profile:
        passes = {recompute: self._passes(layers, recompute, training=True) for recompute in RECOMPUTATIONS}
        passes["evaluation"] = self._passes(layers, "none", training=False)
        tails, quadratic = self._tails(layers), self._quadratic(layers, passes["none"][1])
        return replace(profile, passes=passes, tails=tails, quadratic=quadratic)

    def _passes(self, layers: Sequence[Layer], recompute: str, training: bool) -> tuple[Pass, Pass]:
        """Return a pass of one sample, and one of several samples as lines."""

        def go(samples: int) -> list[Passed]:
            return self._go(layers, samples, self.plan.data.max_length, recompute, training)

        one = Pass.of(spread([same(block) for block in go(1)], layers))
        if self.plan.layout == "single":
            return one, one
        few, many = go(FEW), go(MANY)
        if [(block.kind, block.layer, block.backward) for block in few] != [
            (b.kind, b.layer, b.backward) for b in many
        ]:
            raise ValueError("it goes another way with more samples")
        return one, Pass.of(spread([joined(*pair) for pair in zip(few, many, strict=True)], layers))

    def _go(
        self,
        layers: Sequence[Layer],
        samples: int,
        length: int,
        recompute: str,
        training: bool,
        backward: bool = True,
    ) -> list[Passed]:
        cuda = self.plan.mesh.device == "cuda"
        return self.traced.go(
            self.batch(self.lengths(samples, length)), layers, recompute, training, cuda, backward
        )

    def lengths(self, samples: int, length: int) -> list[int]:
        """Return the samples' lengths: with padding one is shorter, so that there is a mask as in nearly
        every step."""
        shorter = self.plan.layout == "padded" and samples > 1 and length > 1
        return [length] * (samples - shorter) + [length - 1] * shorter

    def batch(self, lengths: Sequence[int]) -> dict[str, Any]:
        """Return the task's micro-batch of samples with these lengths.

        Raises Untraceable if the task cannot make one.
        """
        try:
            return example_batch(self.task, self.config, lengths)
        except Exception as error:  # a task of another package may raise anything
            reason = f"its task {self.plan.task} makes no example: {pretrained.first_line(error)}"
            raise Untraceable(reason) from error

    def _tails(self, layers: Sequence[Layer]) -> dict[str, tuple[tuple[int, Block], ...]]:
        """Return the block after the layers for several numbers of samples, if a chunked loss makes it
        nonlinear."""
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        if not vocabulary or self.task.traits.head != "every-position" or self.plan.layout == "single":
            return {}
        length = self.plan.data.max_length
        breaks = [
            number * chunk_length(vocabulary, self.plan.mesh.device == "cuda") / length for number in _CHUNKS
        ]
        within = [samples for samples in breaks if samples < _MOST_SAMPLES]
        if not within:
            return {}
        steps = {
            1,
            2,
            *(max(1, int(samples)) for samples in within),
            *(int(samples) + 1 for samples in within),
        }
        steps.add(2 * max(steps))
        ends = [
            layer if layer.traced and (layer.begins or layer.ends) else replace(layer, stands_in=-1)
            for layer in layers
        ]
        tails = {}
        for name, training in (("training", True), ("evaluation", False)):
            blocks = []
            for number in sorted(steps):
                passed = self._go(ends, number, length, "none", training, backward=False)
                blocks += [
                    (number, same(block)) for block in passed if block.kind == "tail" and not block.backward
                ]
            tails[name] = tuple(blocks)
        return tails

    def _quadratic(self, layers: Sequence[Layer], several: Pass) -> float:
        """Return the share of a sample's written bytes that grows with the square of its length."""
        length = self.plan.data.max_length
        if self.plan.layout == "single" or length < 32:
            return 0.0
        short = Pass.of(
            spread([same(block) for block in self._go(layers, FEW, length // 4, "none", True)], layers)
        )
        at_few, at_many = (sum(block.traffic[end] for block in several) for end in (0, 1))
        slope = (at_many - at_few) / (MANY - FEW)
        of_short = (sum(block.traffic[0] for block in short) - (at_few - FEW * slope)) / FEW
        part = (length // 4) / length
        return (
            min(1.0, max(0.0, (slope * part - of_short) / (slope * (part - part * part))))
            if slope > 0
            else 0.0
        )


def prepared_task(plan: Plan, config: Any) -> Task:
    """Return the plan's task for a model that has no data yet: with the model's own classes, else with
    two."""
    task = tasks.unprepared(plan)
    if task.has_processor:
        task.prepare(pretrained.read_processor(plan))
    task.adopt(config)
    for part in (task, *task.parts.values()):
        part.labels = (part.own_labels or ["0", "1"]) if part.needs_labels else None
    task.configure(config)
    for one in (config, config.get_text_config()):
        if getattr(one, "pad_token_id", None) is None:
            one.pad_token_id = 0  # normally the tokenizer's; without data any will do
    return task


def example_batch(task: Task, config: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the task's micro-batch of examples with these lengths."""
    samples = [_natural(task.example(length), number, config) for number, length in enumerate(lengths)]
    return to_device(task.collate([[sample] for sample in samples], Draws(0, 0)), "cpu")


def _natural(sample: Sample, number: int, config: Any) -> Sample:
    """Return the sample in the form of a text: without padding inside, with an end; in a causal one the last
    position has no target."""
    text, arrays = config.get_text_config(), dict(sample)
    special = {
        value for name, value in vars(text).items() if name.endswith("_token_id") and isinstance(value, int)
    }
    word = next(number for number in range(len(special) + 1) if number not in special)
    end = getattr(text, "eos_token_id", None)
    end = end[0] if isinstance(end, list) and end else end
    if "input_ids" in arrays and not arrays["input_ids"].any():  # else some tokens are an image's
        most = (getattr(text, "vocab_size", None) or word + 1) - 1
        arrays["input_ids"] = arrays["input_ids"] * 0 + min(word, most)
        if isinstance(end, int) and end <= most:
            arrays["input_ids"][-1] = end
    if "targets" in arrays:
        arrays["targets"] = arrays["targets"].copy()
        arrays["targets"][-1] = IGNORE
    return Sample(arrays, number, sample.length)


def make_profile(plan: Plan) -> Profile:
    """Return the profile of a plan's model: its units, and the memory of each block of a pass.

    Raises ConfigurationError if the model cannot be built here, or cannot do the plan's task.
    """
    return ProfileMaker(plan).profile()


def main() -> None:
    """Read a plan on stdin; write its profile or its problems to the file that the first argument names."""
    gc.disable()  # a fifth of the time, for a process that ends soon
    plan = Plan.model_validate_json(sys.stdin.read())
    try:
        answer: dict[str, Any] = {"profile": make_profile(plan).to_json()}
    except ConfigurationError as error:
        answer = {"problems": [[problem.key, problem.value, problem.reason] for problem in error.problems]}
    Path(sys.argv[1]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
