"""Define the contract of a task: all that job file, planner, data and trainer ask of it.

A task is one module with a subclass of `Task` and one line in `launcher.tasks`; a package of the user's own
names its task as an entry point of the group `launcher.tasks`. Importing it imports neither torch nor numpy
(`launcher.lazy`): the planner asks it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.data.columns import Column, Overview, number_in
from launcher.data.rows import Row, RowProblem
from launcher.data.section import Data
from launcher.errors import Problem
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks.companion import Companion
from launcher.tasks.distillation import Distillation
from launcher.tasks.evaluator import KEEPS_LOSSES, Evaluator, Output
from launcher.tasks.findings import Finding, Left, finding
from launcher.tasks.generation import AnswerOptions, Evaluation, GenerationOptions
from launcher.tasks.roles import Role
from launcher.tasks.sample import IGNORE, Drawn, Draws, Encoded, Sample, ends_of, sample_at
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
"""All that the module of a task needs of the contract, from one place."""


FEW_ROWS = 16
"""Of fewer rows, what they have in common says nothing."""


class Task(ABC):
    """One kind of learning, from the columns of a row to the metrics of an evaluation."""

    name: ClassVar[str]
    """As `model.task` has it."""
    traits: ClassVar[Traits]
    Columns: ClassVar[type[Data]]
    """The section `data` of a job with this task: a subclass of `launcher.data.section.Data` with the task's
    own columns."""
    column_ways: ClassVar[tuple[tuple[str, ...], ...]]
    """The columns that a job may name, one way or another: what `launcher init` asks for."""
    column_roles: ClassVar[Mapping[str, Role]] = {}
    """Which columns of a file `launcher init` offers for them; of one left out, any column of text."""
    layout: SampleLayout
    """How samples share a pass in `collate`: as the plan says, else as most models of the task can."""
    head: Head = "chunked"
    """Where the loss of a causal LM comes from."""
    labels: list[str] | None = None
    """The names of the classes in the order of their ids, where the task has classes and they are known."""
    writes: ClassVar[bool] = False
    """Whether the model can write an answer to a row, so that a job may set `evaluation.generate`."""
    distils: ClassVar[bool] = False
    """Whether its loss asks a teacher where a job names one."""
    keeps_losses: ClassVar[bool] = False
    """Whether `loss` gives the loss of each position or sample where a batch asks for it (`KEEPS_LOSSES`): by it
    the loss of each of several sources is known."""
    for_prediction: bool = False
    """Whether rows are answered: labels may be absent, and `columns`, `texts` and `encode` ask for none."""
    keeps_fitted: bool = False
    """Whether an evaluation uses what `adopt_evaluation` took and fits nothing anew, as for a finished model."""
    evaluation: Evaluation = Evaluation()
    """The section `evaluation` of the job: what is done with held-out rows beside computing their loss."""
    distillation: Distillation | None = None
    """The teacher that is learned from beside the rows, where the job names one."""

    def __init__(self, data: Any, labels: list[str] | None = None) -> None:
        self.data = data
        self.layout = self.traits.layout
        self.labels = labels
        self.own_labels: list[str] | None = None
        """The classes of the model that training begins with, where it has any, in the order of their ids."""
        self.remarks: list[str] = []
        """Remarks for people on how the rows suit the model, a sentence each; written by `fit`."""
        self.labels_given = labels is not None
        """Whether the classes were given, as for a model that has them, rather than taken from training rows."""

    @classmethod
    def settings_for(cls, columns: Mapping[str, Column], seen: Overview) -> dict[str, Any]:
        """Return further keys of `data` that the rows of a new job ask for. `columns`: that of each role."""
        return {}

    # Asked by the job file and the planner, with no tokenizer and no model at hand.

    def checks(self) -> Iterator[Finding]:
        """Yield the contradictions among the task's own keys."""
        if self.data.packing and self.traits.layout != "packed":
            reason = "only language models pack; set it to false: samples are sorted by length and padded"
            yield finding("data.packing", True, reason, "model.task")

    @property
    @abstractmethod
    def metrics(self) -> Mapping[str, Better]:
        """Return the metrics of an evaluation, and which way each is better; `loss` is always among them."""

    @property
    def kind(self) -> str:
        """Return the name to which metrics belong: the task's, or that of a kind with other metrics."""
        return self.name

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Return the columns of a row that the task reads."""

    @abstractmethod
    def texts(self, row: dict[str, Any]) -> list[str]:
        """Return the texts of a row that become tokens. Raises RowProblem where the row cannot be used."""

    def doubts(self, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
        """Yield what makes one doubt, of some usable rows, that their columns are what the job takes them
        for."""
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
        """Yield what of some usable rows is worth knowing, by the key of the job that would change it."""
        yield from ()

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        """Return how many tokens a sample has beside its texts. `tokenizer`: of tokenizers, or None."""
        return 0

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        """Return the length in tokens of each sample of a row. `tokens`: those of each of its texts; `added`:
        those beside them."""
        length, limit = sum(tokens) + added, self.data.max_length
        return [min(length, limit)] if self.data.too_long == "cut" or length <= limit else []

    def left_open(self) -> Iterator[Left]:
        """Yield the keys of `data` that the plan settles for the job; a resumed run keeps its first plan's."""
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
        """Return the tasks that one model learns at once, by name; nothing of one task alone."""
        return {}

    # The model.

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """Return the transformers Auto class of the model."""

    processor_class: ClassVar[str] = "AutoTokenizer"
    """The transformers Auto class with which an export's users read rows."""

    keeps_processor: ClassVar[bool] = False
    """Whether the processor stays as it is in the model's files, and an export takes those along."""
    joins_tokenizer: ClassVar[bool] = False
    """Whether the processor of `read_processor` gets the model's tokenizer, as its attribute `tokenizer`."""

    @property
    def has_processor(self) -> bool:
        """Return whether rows are read by the processor of `read_processor`, and not by a tokenizer."""
        return type(self).read_processor is not Task.read_processor

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        """Return a processor that reads rows, in the place of a tokenizer, from a model's files.

        `options` are those of `from_pretrained`: `revision`, `trust_remote_code`. Raises OSError or ValueError
        where the files have none that can be used.
        """
        raise NotImplementedError(f"a {self.name} task reads rows by a tokenizer")

    def usual_processor(self, config: Any) -> Any:
        """Return the usual processor of such models, for a model whose files have none. Raises ValueError where
        there is none."""
        raise ValueError("its files have none")

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:  # noqa: B027
        """Take from a model's own config what the task keeps. Called before `configure`, and before any row is
        encoded.

        `as_it_stands`: the model is measured and not trained, so that nothing of it may be new; raises
        ConfigurationError where that cannot be.
        """

    def configure(self, config: Any) -> None:  # noqa: B027
        """Write what the model must know of the task into its config: classes, kind of problem, padding."""

    def configure_generation(self, generation: Any) -> None:  # noqa: B027
        """Write how answers begin and end into an export's transformers GenerationConfig."""

    def chance_loss(self, config: Any) -> float | None:
        """Return the loss of guessing, where a model stays that learns nothing; None where it is not known."""
        return None

    def other_head(self, stored: Any, config: Any) -> str | None:
        """Return by which size of the config the head is found that a model's files have and training does not
        take: it is for other classes, or the same in another order. None where it is taken.

        `stored`: the config of the files; `config`: that of the model that trains.
        """
        own = classes.of_model(stored, self.auto_class.__name__.removeprefix("AutoModelFor"))
        names = [config.id2label[number] for number in range(config.num_labels)]
        return None if own is not None and classes.same(own, names) else "num_labels"

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Return the frozen models that compute beside the one that trains, by name: the job's teacher.

        A task that has some gets them in `loss` by a further argument, `others`: modules by these names. Such a
        task's `plain_batch` returns None, as the model's own class knows nothing of them, unless they are
        asked in training alone.
        """
        return {} if self.distillation is None else self.distillation.companions

    # Rows and samples.

    @property
    def needs_labels(self) -> bool:
        """Return whether rows can only be encoded once the classes are known."""
        return False

    @property
    def streams(self) -> bool:
        """Return whether rows can be learned from before all of them were read: nothing is counted or fitted
        over them, and none names a file."""
        counts = type(self).learn_from is not Task.learn_from
        return not (self.needs_labels or counts or self.traits.reads_files)

    @property
    def key(self) -> Any:
        """Return what else decides a row's sample, beside the row, the job's settings and the processor.

        None where nothing does. Asked once the task is prepared.
        """
        return None

    def refuse_unknown(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Raise ConfigurationError where rows have labels that the model does not know."""

    def fit(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Learn the classes from the training rows."""

    def learn_from(self, column: Callable[[str], np.ndarray | None]) -> None:  # noqa: B027
        """Take from the prepared training samples what the loss needs, such as how common each class is.

        `column` returns an array of all samples, end to end. Raises ConfigurationError for settings that do not
        suit these samples.
        """

    def prepare(self, processor: Any) -> None:  # noqa: B027
        """Take what the task needs from the model's processor: a tokenizer, or that of `read_processor`.

        Called before any row is encoded or batch collated.

        Raises ConfigurationError where this processor cannot serve the task.
        """

    @abstractmethod
    def encode(
        self, rows: Sequence[dict[str, Any]], processor: Any
    ) -> Sequence[Encoded | tuple[Encoded, ...] | RowProblem]:
        """Return for each row a sample, several (overlapping windows of a long row), or why it has none.

        Deterministic; called in worker processes.
        """

    @abstractmethod
    def example(self, length: int) -> Sample:
        """Return a sample of `length` positions with made-up values, to trace a model without data."""

    @abstractmethod
    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the tensors of a micro-batch of items. `draws` is None where nothing may be random.

        Arrays and texts for the evaluator alone go under the key `aside`, which never reaches a device or the
        model. Numbers reach the model in what it computes in, but for those of `labels` and `weights`.
        """

    @property
    def mixes(self) -> bool:
        """Return whether training samples have partners (`Sample.partner`), with which `collate` mixes them."""
        return False

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn | None:
        """Return what the model sees or hears of a sample, as `collate` alters it by these draws, and what is
        learned of it; None for a task of texts.

        Raises DataError where its file is no longer what it was.
        """
        return None

    # Loss and metrics.

    def in_a_step(self, num_supervised: Sequence[int]) -> dict[str, Any]:
        """Return what a training batch has beside what `collate` makes, by how much of each source the whole
        global batch supervises."""
        return {}

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample cut to about `length` positions, its last one kept, for the check after loading.

        `ends`: the ids of the model's end tokens. Raises DataError where the sample is not one of `encode`.
        """
        return sample_at(sample, ends_of(sample.length, length))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        """Return one sample as transformers' documentation has it, for the model's own class, with `labels`
        where that computes a loss.

        None where there is no such call: the sample is then compared with itself beside another one.
        """
        return None

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of a collated micro-batch. Runs as the model's own forward, inside its
        sharding hooks."""

    @property
    def generates(self) -> bool:
        """Return whether the model writes an answer to each sample of an evaluation."""
        return False

    @property
    def generation(self) -> GenerationOptions:
        """Return how it writes. Raises NotImplementedError for a task whose model does not write."""
        raise NotImplementedError(f"the model of a {self.name} task writes nothing")

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the prompts of a batch's samples, in the order of `collate`.

        `input_ids` and `attention_mask` int64 [samples, longest]; `ids` and `windows` of the samples, by which
        draws are told apart. Raises NotImplementedError for a task whose model does not write.
        """
        raise NotImplementedError(f"the model of a {self.name} task writes nothing")

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """Return an empty evaluator, to collect one evaluation."""

    def marked(self, sample: Sample, name: str | None) -> Sample:
        """Return the sample, with a mark of which of several tasks it is; `name` is None for one task alone."""
        return sample

    def evaluator_of(self, source: Any, alias: str) -> Evaluator | None:
        """Return an empty evaluator for one of several sources, by its section and its name; None where its
        metrics are measured anyway."""
        return self.evaluator()

    # Answers of the model.

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the model's answer to each sample, as JSON values: classes, tags, spans, text.

        `output` is that of `batch`, which `collate` returned for the samples, one an item. The answer to filler
        does not matter. A task that leaves this out can be trained and measured, but does not predict.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what its model says")

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer for a row from those of its samples, in window order."""
        [only] = parts
        return dict(only)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:  # noqa: B027
        """Take what an evaluation fitted, such as a threshold, from `Evaluator.details`. Called before any
        prediction."""
