"""The questions of `launcher init`, in order: each answer is checked at once and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.cli import completion
from launcher.cli.dialog import Complete, Dialog
from launcher.cli.init_answers import (
    NONE,
    columns_among,
    given_columns,
    gpu,
    help_of,
    in_a_line,
    model_in,
    one_of,
    or_none,
    parse_value,
    share_of,
    shown,
)
from launcher.data.hold_out import split
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.job.init import keep
from launcher.planner.dataset.suitability import NO_EVALUATION
from launcher.planner.draft import Draft
from launcher.planner.model.model_config import locate, read_config
from launcher.tasks.task import Task


class Questions:
    """Questions about the content of a job file, answered by flags or in a dialog."""

    def __init__(
        self, dialog: Dialog, out: Path, flags: Mapping[str, str], columns: Sequence[str] = ()
    ) -> None:
        self._dialog = dialog
        self._out = out
        self._flags = flags
        self._columns = list(columns)
        self._draft = Draft(out.parent)

    def content(self, earlier: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the job file. `earlier`: kept answers, which become the defaults.

        Raises ConfigurationError or DataError for an invalid flag, or for a missing one if nobody is asked;
        KeyboardInterrupt or EOFError if the answers end before the questions.
        """
        self._draft.content = earlier
        if self._dialog.asks and self._out.parent != Path():
            self._dialog.say(f"files are named as the job file will see them, from {self._out.parent}")
        self._ask_train()
        self._ask_evaluation()
        self._ask_task()
        self._ask_columns()
        self._ask_model()
        self._ask_length()
        self._draft.put("batch.global_batch_size", self._draft.batch())
        self._ask(
            "epochs", "training.epochs", "Passes over the rows (epochs)", self._draft.epochs(), parse_value
        )
        self._ask_adapter()
        self._ask_rate()
        self._ask_where()
        self._ask("name", "name", "Name of the run", self._draft.name(), str)
        return self._draft.content

    def _ask(
        self,
        flag: str,
        key: str,
        question: str,
        default: Any,
        read: Callable[[str], Any],
        complete: Complete | Sequence[str] = (),
    ) -> None:
        """Ask for a key's value until it is valid, and keep it. An earlier answer is the default."""

        def check(text: str) -> None:
            before = self._draft.get(key)
            self._draft.put(key, read(text))
            findings = self._draft.findings(key)
            if findings.problems:
                self._draft.put(key, before)
                raise ConfigurationError(list(findings.problems))
            for remark in findings.remarks:
                self._dialog.say(f"  note: {remark}")

        earlier = self._draft.get(key)
        default = default if earlier is None else earlier
        offered = None if default is None else str(default)
        option, given = f"--{flag.replace('_', '-')}", self._flags.get(flag)
        self._dialog.answer(question, option, given, check, offered, complete, help_of(key))
        self._keep()

    def _keep(self) -> None:
        if self._dialog.asks:
            keep(self._out, self._draft.content)

    def _ask_train(self) -> None:
        question = "File to learn from, or a folder of images or sounds"
        self._ask_file("train", question, self._draft.get("data.train.path"))
        for line in shown(self._draft.get("data.train.path"), self._draft.seen()):
            self._dialog.say(line)

    def _ask_evaluation(self) -> None:
        # A file that nobody named is only offered as an answer, so it is not used if nobody is asked.
        near = self._draft.held_out() if self._dialog.asks else None
        offered = self._draft.get("data.evaluation.path") or near or ""
        self._ask_file("evaluation", "File to measure on, or 10% to hold out such a share, or none", offered)
        if self._draft.get("data.evaluation") is None:
            self._dialog.say(f"  {NO_EVALUATION}")

    def _ask_file(self, role: str, question: str, offered: str | None) -> None:
        """Ask for a readable data file; the one of `evaluation` may be left out."""
        flag = f"--{role}"

        def check(text: str) -> None:
            if role == "evaluation" and (share := share_of(text)) is not None:
                self._hold_out(share)
                return
            before = self._draft.get(f"data.{role}")
            is_file = role == "train" or text.lower() not in NONE
            self._draft.put(f"data.{role}", {"path": text} if is_file else None)
            try:
                if is_file:
                    self._draft.seen(f"data.{role}.path")
            except DataError as error:
                self._draft.put(f"data.{role}", before)
                reason = str(error).removeprefix(f"{text}: ")
                raise ConfigurationError(Problem(flag, text, reason)) from None

        given = self._flags.get(role)
        about = help_of("data.train.path" if role == "train" else "data.evaluation")
        self._dialog.answer(question, flag, given, check, offered, completion.data_files, about)
        self._keep()

    def _hold_out(self, share: float) -> None:
        """Replace the training file by two files with its rows, or by existing ones from the same split."""
        given = Path(self._draft.get("data.train.path"))
        whole = given.with_name(f"{given.stem.removesuffix('-train')}{given.suffix}")
        half = str(given.with_name(f"{whole.stem}-evaluation{whole.suffix}"))
        if whole != given and self._draft.get("data.evaluation.path") == half:
            given = whole  # an earlier dialog split it, and its answers were kept
        for role, (path, rows) in split(self._out.parent / given.expanduser(), share).items():
            name = str(given.with_name(path.name))
            self._draft.put(f"data.{role}", {"path": name})
            self._dialog.say(f"  {name}: {rows:,} rows")

    def _ask_task(self) -> None:
        def check(text: str) -> str:
            return str(tasks.find(text).name)

        likely = self._draft.likely_tasks()
        if self._dialog.asks and "task" not in self._flags:
            width = max(map(len, likely))
            self._dialog.say("Tasks, those that fit these columns first:")
            for name in likely:
                self._dialog.say(f"  {name:{width}}  {in_a_line(tasks.find(name))}")
        offered = self._draft.get("model.task") or likely[0]
        given = self._flags.get("task")
        task = self._dialog.answer(
            "Task", "--task", given, check, offered, tasks.names(), help_of("model.task")
        )
        self._draft.put("model.task", task)
        self._keep()

    def _ask_columns(self) -> None:
        task = self._draft.task
        earlier = {role: self._draft.get(f"data.{role}") for way in task.column_ways for role in way}
        while True:
            columns = (
                given_columns(self._columns, task) if self._columns else self._chosen_columns(task, earlier)
            )
            self._set_columns(columns)
            if self._columns_are_taken():
                break
            earlier = columns
        self._keep()

    def _columns_are_taken(self) -> bool:
        """Print the problems of the columns in these rows, and return whether the columns are accepted.

        A file of held-out rows that lacks these columns is left out, as other columns would not help.
        """
        findings = self._draft.findings("data", without_length=True)
        if findings.problems and (self._columns or not self._dialog.asks):
            raise ConfigurationError(list(findings.problems))
        for one in findings.problems:
            self._dialog.say(f"  {one}")
        if any(not one.key.startswith("data.evaluation") for one in findings.problems):
            return False
        if findings.problems:
            self._draft.put("data.evaluation", None)
            self._dialog.say("  so that file is left out; another one can be named as data.evaluation")
        for one in findings.remarks:
            self._dialog.say(f"  note: {one}")
        # Remarks on the files put the columns in doubt; other remarks are only worth knowing.
        doubts = any(one.key.startswith(("data.train", "data.evaluation")) for one in findings.remarks)
        agreed = not doubts or bool(self._columns)
        return agreed or self._dialog.agrees("Take these columns all the same?")

    def _set_columns(self, columns: Mapping[str, Any]) -> None:
        """Replace the columns, and set the other keys that these columns' values need."""
        counts_tokens = self._draft.task.Columns.model_fields["max_length"].default != 1
        kept = ("train", "evaluation", *(["max_length"] if counts_tokens else []))
        place = {key: self._draft.get(f"data.{key}") for key in kept}
        settings = self._draft.settings(columns)
        self._draft.put(
            "data", {key: value for key, value in (place | dict(columns) | settings).items() if value}
        )
        for key, value in settings.items():
            self._dialog.say(f"  data.{key}: {str(value).lower()}, as these rows need it")

    def _chosen_columns(self, task: type[Task], earlier: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that the user names, or those that fit best."""
        offered = {role: name for role, name in earlier.items() if name} or dict(self._draft.columns())
        ways = task.column_ways
        way = max(ways, key=lambda one: len(set(one) & set(offered))) if offered else ways[0]
        if not self._dialog.asks:
            return offered
        if len(ways) > 1:
            names = {" and ".join(one): one for one in ways}
            first = " and ".join(way)
            question = f"The rows are one of: {', '.join(names)}"
            way = self._dialog.answer(question, "--column", None, one_of("rows", names), first, list(names))
        if set(way) - offered.keys():
            offered = {**self._draft.columns(way), **offered}
        return {role: self._ask_column(role, offered.get(role)) for role in way}

    def _ask_column(self, role: str, offered: Any) -> Any:
        seen = self._draft.seen()
        check = columns_among(role, seen.names)
        default = ",".join(offered) if isinstance(offered, (list, tuple)) else offered
        return self._dialog.answer(
            f"Column of the {role}", "--column", None, check, default, seen.names, help_of(f"data.{role}")
        )

    def _ask_model(self) -> None:
        if self._dialog.asks and "model" not in self._flags and (example := self._draft.example_model()):
            here = completion.models_to_train("")
            tab = "; the tab key names those on this machine" if here else ""
            self._dialog.say(f"  a small one on the hub: {example}{tab}")
        model_here = partial(model_in, self._out.parent, self._dialog.say)
        question, name = "Model: a directory, or a name on the hub", None
        while True:
            self._ask("model", "model.name", question, None, model_here, completion.models_to_train)
            before, name = name, self._draft.get("model.name")
            path = self._out.parent / Path(name).expanduser()
            if name == before or path.is_dir() or read_config(locate(name)) is not None:
                break
            self._dialog.say(f"  {name} is not on this machine; a run fetches it from the hub")
            if "model" in self._flags or not self._dialog.asks:
                break
            question = "Keep it, or name another model"

    def _ask_length(self) -> None:
        length, rests_on = self._draft.length()
        if length is None:
            return
        if rests_on:
            self._dialog.say(f"  of the rows looked at: {rests_on}")
        self._ask("max_length", "data.max_length", "Longest sample in tokens", length, parse_value)

    def _ask_rate(self) -> None:
        rate, remark = self._draft.rate()
        if remark:
            self._dialog.say(f"  {remark}")
        self._ask("learning_rate", "training.learning_rate", "Learning rate", rate, parse_value)

    def _ask_adapter(self) -> None:
        def read(text: str) -> Any:
            return None if text.lower() in (*NONE, "all") else {"rank": parse_value(text)}

        earlier = self._draft.get("model.adapter.rank")
        question = "Train all weights, or a LoRA adapter of which rank"
        self._draft.put("model.adapter", None)
        self._ask("adapter", "model.adapter", question, earlier or "all", read, ("all", "8", "16", "32"))

    def _ask_where(self) -> None:
        places = {"here": "here", "slurm": "slurm"}
        of_slurm = any(flag in self._flags for flag in ("nodes", "gpus_per_node", "gpu", "time_limit"))
        default = "slurm" if of_slurm or self._draft.get("cluster") else "here"
        where = self._dialog.answer(
            "Run it here, or submit it to slurm; the file can be changed later",
            "--where",
            self._flags.get("where"),
            one_of("--where", places),
            default,
            list(places),
            "slurm adds the section `cluster`: nodes, GPUs, time limit. Without it a job runs on the machine "
            "where `launcher run` is typed, and the section can be added before `launcher submit`",
        )
        if where == "here":
            self._draft.put("cluster", None)
            return
        self._ask("nodes", "cluster.nodes", "Nodes", 1, parse_value)
        self._ask("gpus_per_node", "cluster.gpus_per_node", "GPUs of each node", 8, parse_value)
        if self._draft.get("cluster.gpus_per_node"):
            question = "Kind of GPU, or none where it is not known"
            self._ask("gpu", "cluster.gpu", question, "", gpu, completion.gpu_names)
        self._ask("time_limit", "cluster.time_limit", "Time limit of a job, as 8h, or none", "", or_none)
