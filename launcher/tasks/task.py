"""The interface of a task, as the job file, the planner, the data code and the trainer use it.

A task is one module with a subclass of `Task` and one line in `launcher.tasks`. A user's own package
registers its task as an entry point of the group `launcher.tasks`. Importing the module imports neither torch
nor numpy (`launcher.lazy`), because the planner uses it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.data.columns import Column, Overview, number_in
from launcher.data.rows import Row, RowProblem, required
from launcher.data.section import Data
from launcher.errors import Problem
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks.companion import Companion
from launcher.tasks.distillation import Distillation
from launcher.tasks.encoding import too_long
from launcher.tasks.evaluator import KEEPS_LOSSES, Evaluator, Output
from launcher.tasks.findings import Finding, Left, finding
from launcher.tasks.generation import AnswerOptions, Evaluation, GenerationOptions
from launcher.tasks.roles import Role
from launcher.tasks.sample import IGNORE, Drawn, Draws, Encoded, Sample, ends_of, sample_at, virtual_ids
from launcher.tasks.traits import Head, SampleLayout, Traits

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "IGNORE",
    "KEEPS_LOSSES",
    "AnswerOptions",
    "Better",
    "Companion",
    "Draws",
    "Encoded",
    "Evaluator",
    "Finding",
    "Head",
]
__all__ += ["Left", "Output", "Sample", "SampleLayout", "Task", "Traits", "ends_of", "finding", "sample_at"]
__all__ += ["virtual_ids"]
"""Every name that a task's module needs from this interface, in one place."""


FEW_ROWS = 16
"""The fewest rows from which `doubts` concludes anything."""


class Task(ABC):
    """One kind of learning, from the columns of a row to the metrics of an evaluation."""

    name: ClassVar[str]
    """The value of `model.task`."""
    traits: ClassVar[Traits]
    Columns: ClassVar[type[Data]]
    """The section `data` of a job with this task: a subclass of `launcher.data.section.Data` with the task's
    own columns."""
    column_ways: ClassVar[tuple[tuple[str, ...], ...]]
    """The alternative sets of columns that a job may name: `launcher init` asks for one of them."""
    column_roles: ClassVar[Mapping[str, Role]] = {}
    """Which columns of a file `launcher init` offers for each; any text column for one without an entry."""
    layout: SampleLayout
    """How `collate` arranges samples in a pass: the plan's layout, else one that most models support."""
    head: Head = "chunked"
    """How the loss of a causal LM is computed from its head."""
    labels: list[str] | None = None
    """The class names in the order of their ids; None if there are no classes or they are not yet known."""
    writes: ClassVar[bool] = False
    """Whether the model can generate an answer to a row, so that a job may set `evaluation.generate`."""
    distils: ClassVar[bool] = False
    """Whether the loss uses a teacher where a job names one."""
    keeps_losses: ClassVar[bool] = False
    """Whether `loss` returns the loss of each position or sample if a batch asks for it (`KEEPS_LOSSES`), so
    that the loss of each data source can be reported."""
    for_prediction: bool = False
    """Whether rows are for prediction: labels may be absent; `columns`, `texts` and `encode` need none."""
    keeps_fitted: bool = False
    """Whether an evaluation uses the values from `adopt_evaluation`, as for a finished model, and fits
    none."""
    evaluation: Evaluation = Evaluation()
    """The section `evaluation` of the job: what is done with held-out rows in addition to their loss."""
    virtual_tokens: int = 0
    """The learned vectors before each sample, by prompt tuning; they count in `data.max_length`."""
    virtual_prefix: bool = False
    """Whether they are keys and values (prefix tuning), from which no word is learned."""
    distillation: Distillation | None = None
    """The teacher to learn from in addition to the rows, if the job names one."""

    def __init__(self, data: Any, labels: list[str] | None = None) -> None:
        self.data = data
        self.layout = self.traits.layout
        self.labels = labels
        self.own_labels: list[str] | None = None
        """The classes of the model that training starts from, if it has any, in the order of their ids."""
        self.remarks: list[str] = []
        """Remarks for people on how the rows suit the model, one sentence each; written by `fit`."""
        self.labels_given = labels is not None
        """Whether the classes came from the model or the caller, not from training rows."""

    @classmethod
    def settings_for(cls, columns: Mapping[str, Column], seen: Overview) -> dict[str, Any]:
        """Return further keys of `data` for a new job, by its rows. `columns`: the column of each role."""
        return {}

    # Used by the job file and the planner, which have neither tokenizer nor model.

    def checks(self) -> Iterator[Finding]:
        """Yield the contradictions among the task's own keys."""
        if self.data.packing and self.traits.layout != "packed":
            reason = "only language models pack; set it to false: samples are sorted by length and padded"
            yield finding("data.packing", True, reason, "model.task")
        for way in self.column_ways:
            for first, second in combinations(way, 2):
                column, other = getattr(self.data, first), getattr(self.data, second)
                if other is not None and (column == other or (isinstance(column, tuple) and other in column)):
                    reason = f"is the column of data.{first} as well; name the column that has the {second}"
                    yield finding(f"data.{second}", other, reason, f"data.{first}", "model.task")

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Better]:
        """Return the metrics of an evaluation, each with its better direction; always includes `loss`."""

    @property
    def kind(self) -> str:
        """Return the name that decides the metrics: the task's, or that of a variant with other metrics."""
        return self.name

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the columns of a row that the task reads."""

    @property
    def required_columns(self) -> list[str]:
        """Return the columns that a source must have."""
        return required(self.columns)

    @abstractmethod
    def texts(self, row: dict[str, Any]) -> list[str]:
        """Return the texts of a row that become tokens. Raises RowProblem where the row cannot be used."""

    def doubts(self, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Yield the reasons to doubt, seen in some usable rows, that the job names the right columns."""
        texts = [self.texts(row) for row in rows]
        if len(rows) < FEW_ROWS or not all(texts):
            return
        if all(number_in(each[0]) is not None for each in texts):
            what, column = f"a number for a text, as {texts[0][0][:40]!r}", self.columns[0]
            yield f"each of {len(rows)} rows has {what}; is the text in another column than {column!r}?"
        if all(len(each) > 1 and each[0] == each[1] for each in texts):
            names = " and ".join(map(repr, self.columns[:2]))
            yield f"each of {len(rows)} rows has the same text twice, in {names}; name another column for one"

    def notes(self, rows: Sequence[dict[str, Any]]) -> Iterator[Problem]:
        """Yield notes on some usable rows, each under the job key that would change the matter."""
        yield from ()

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        """Return how many tokens a sample has besides its texts. `tokenizer`: of `tokenizers`, or None."""
        return 0

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        """Return the length in tokens of each sample of a row. `tokens`: the tokens of each of its texts;
        `added`: the tokens besides them."""
        length, limit = sum(tokens) + added, self.data.max_length
        return [min(length, limit)] if self.data.too_long == "cut" or length <= limit else []

    def why_too_long(self, tokens: Sequence[int], added: int) -> RowProblem | None:
        """Return why no sample is left of a row that is too long; None if that is not certain. The arguments are
        those of `sample_lengths`."""
        length, limit = sum(tokens) + added, self.data.max_length
        return too_long(length, limit) if self.data.too_long != "cut" and length > limit else None

    def left_open(self) -> Iterator[Left]:
        """Yield the keys of `data` that the plan decides; a resumed run keeps its first plan's values."""
        yield from ()

    @property
    def packs(self) -> bool:
        """Return whether several samples share a row of max_length."""
        return bool(self.data.packing) and self.padding_free

    @property
    def padding_free(self) -> bool:
        """Return whether `collate` joins samples end to end instead of padding them."""
        return self.layout == "packed"

    @property
    def parts(self) -> Mapping[str, Task]:
        """Return the tasks that one model learns at once, by name; empty for a single task."""
        return {}

    # The model.

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """Return the transformers Auto class of the model."""

    processor_class: ClassVar[str] = "AutoTokenizer"
    """The transformers Auto class of the processor that an export's users load."""

    keeps_processor: ClassVar[bool] = False
    """Whether an export copies the processor's files from the model unchanged."""
    joins_tokenizer: ClassVar[bool] = False
    """Whether the processor of `read_processor` gets the model's tokenizer, as its attribute `tokenizer`."""

    @property
    def has_processor(self) -> bool:
        """Return whether rows are encoded by the processor of `read_processor` instead of a tokenizer."""
        return type(self).read_processor is not Task.read_processor

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        """Return the processor in a model's files, which encodes rows instead of a tokenizer.

        `options` are those of `from_pretrained`: `revision`, `trust_remote_code`. Raises OSError or
        ValueError if the files have no usable processor.
        """
        raise NotImplementedError(f"a {self.name} task reads rows by a tokenizer")

    def usual_processor(self, config: Any) -> Any:
        """Return the usual processor of this kind of model, for files without one. Raises ValueError if there
        is no usual one."""
        raise ValueError("its files have none")

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:  # noqa: B027
        """Take the settings that the task keeps from a model's own config. Called before `configure`, and
        before any row is encoded.

        `as_it_stands`: the model is evaluated and not trained, so no part of it may be new; raises
        ConfigurationError where some part would be.
        """

    def configure(self, config: Any) -> None:  # noqa: B027
        """Write the task's settings into the model's config: classes, kind of problem, padding."""

    def configure_generation(self, generation: Any) -> None:  # noqa: B027
        """Write how answers begin and end into an export's transformers GenerationConfig."""

    def chance_loss(self, config: Any) -> float | None:
        """Return the loss of guessing, at which a model that learns nothing stays; None if unknown."""
        return None

    def other_head(self, stored: Any, config: Any) -> str | None:
        """Return the config key that gives the size of the files' head, if training cannot use that head: it
        is for other classes, or the same in another order. None if training uses it.

        `stored`: the config in the files; `config`: the config of the model that trains.
        """
        own = classes.of_model(stored, self.auto_class.__name__.removeprefix("AutoModelFor"))
        names = [config.id2label[number] for number in range(config.num_labels)]
        return None if own is not None and classes.same(own, names) else "num_labels"

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Return the frozen models that the loss uses next to the one that trains, by name: the job's
        teacher.

        A task with companions gets them in `loss` as a further argument, `others`: modules by these names.
        Its `plain_batch` returns None, because the model's own class knows nothing of them, unless only
        training uses them.
        """
        return {} if self.distillation is None else self.distillation.companions

    # Rows and samples.

    @property
    def needs_labels(self) -> bool:
        """Return whether rows can only be encoded once the classes are known."""
        return False

    @property
    def streams(self) -> bool:
        """Return whether training can start before all rows were read: nothing is counted or fitted over
        them, and no row names a file."""
        counts = type(self).learn_from is not Task.learn_from
        return not (self.needs_labels or counts or self.traits.reads_files)

    @property
    def key(self) -> Any:
        """Return what else decides a row's sample, besides the row, the job's settings and the processor.

        None where nothing does. Called once the task is prepared.
        """
        return None

    def refuse_unknown(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Raise ConfigurationError where rows have labels that the model does not know."""

    def fit(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Learn the classes from the training rows."""

    def learn_from(self, column: Callable[[str], np.ndarray | None]) -> None:  # noqa: B027
        """Take statistics that the loss needs from the prepared training samples, for example class
        frequencies.

        `column` returns one array of all samples, concatenated. Raises ConfigurationError for settings that
        do not suit these samples.
        """

    def prepare(self, processor: Any) -> None:  # noqa: B027
        """Take what the task needs from the model's processor: a tokenizer, or the one from `read_processor`.

        Called before any row is encoded or batch collated.

        Raises ConfigurationError if the task cannot use this processor.
        """

    @abstractmethod
    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> Sequence[Encoded | tuple[Encoded, ...] | RowProblem]:
        """Return for each row one sample, several (overlapping windows of a long row), or why it has none.

        Deterministic; called in worker processes.
        """

    @abstractmethod
    def example(self, length: int) -> Sample:
        """Return a sample of `length` positions with made-up values, to trace a model without data."""

    @abstractmethod
    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the tensors of a micro-batch of items. `draws` is None where nothing may be random.

        Arrays and texts for the evaluator alone go under the key `aside`, which never reaches a device or the
        model. Floating-point tensors are cast to the compute dtype, except `labels` and `weights`.
        """

    @property
    def mixes(self) -> bool:
        """Return whether `collate` mixes each training sample with a partner (`Sample.partner`)."""
        return False

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn | None:
        """Return a picture of the model's input for a sample, as `collate` augments it by these draws, and
        its target as text; None for a text task.

        Raises DataError if the sample's file has changed.
        """
        return None

    # Loss and metrics.

    def in_a_step(self, num_supervised: Sequence[int]) -> dict[str, Any]:
        """Return the further entries of a training batch that depend on the global batch: on how much of each
        source it supervises."""
        return {}

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample shortened to about `length` positions, its last one kept, for the check after
        loading.

        `ends`: the ids of the model's end tokens. Raises DataError if `encode` did not make the sample.
        """
        return sample_at(sample, ends_of(sample.length, length))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        """Return one sample as a call of the model's own class in transformers' documentation, with `labels`
        if that class computes a loss.

        None if there is no such call: the sample alone is then compared with itself in a batch of two.
        """
        return None

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of a collated micro-batch. Runs as the model's forward, inside its sharding
        hooks."""

    @property
    def generates(self) -> bool:
        """Return whether the model generates an answer to each sample of an evaluation."""
        return False

    @property
    def generation(self) -> GenerationOptions:
        """Return the options of generation. Raises NotImplementedError for a task that does not generate."""
        raise NotImplementedError(f"the model of a {self.name} task writes nothing")

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the prompts of a batch's samples, in the order of `collate`.

        `input_ids` and `attention_mask` int64 [samples, longest]; `ids` and `windows` of the samples, which
        seed their draws. Raises NotImplementedError for a task that does not generate.
        """
        raise NotImplementedError(f"the model of a {self.name} task writes nothing")

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """Return an empty evaluator for one evaluation."""

    def marked(self, sample: Sample, name: str | None) -> Sample:
        """Return the sample, marked as one of the task `name` of several (None for a single task)."""
        return sample

    def evaluator_of(self, source: Any, alias: str) -> Evaluator | None:
        """Return an empty evaluator for one of several sources, by its section and its name; None if its
        metrics are computed anyway."""
        return self.evaluator()

    # Answers of the model.

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the model's answer to each sample, as JSON values: classes, tags, spans, text.

        `output` is the output for `batch`, which `collate` returned for the samples, one per item. Answers to
        padding samples do not matter. A task without this method can be trained and evaluated, but not
        predict.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what its model says")

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer for a row from the answers for its samples, in window order."""
        [only] = parts
        return dict(only)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:  # noqa: B027
        """Take the values that an evaluation fitted, for example a threshold, from `Evaluator.details`.
        Called before any prediction."""
