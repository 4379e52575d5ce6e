"""Submit a run through submitit, exactly once, whatever the controller does meanwhile."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core import utils

from launcher.errors import (
    ControllerUnreachableError,
    RunInUseError,
    SchedulerError,
    StorageError,
    first_line,
)
from launcher.launch.slurm import client, inherited
from launcher.launch.slurm.node import NodeTask
from launcher.launch.slurm.queue import queue
from launcher.launch.slurm.record import JobRecord, folder, is_live
from launcher.planner.plan import Plan
from launcher.render import sbatch
from launcher.render.launch_paths import Place
from launcher.runs.layout import RunDirectory

_SECONDS_TO_FIND_OUT = 120.0
"""For a controller that did not answer to come back and say whether it has the job."""


class Executor(submitit.SlurmExecutor):
    """submitit's, without its questions to this machine, and with a submission that is never made twice."""

    def __init__(self, run: RunDirectory, plan: Plan, place: Place) -> None:
        super().__init__(folder=folder(run), python=sbatch.python_command(plan, place))
        self._run = run
        self.update_parameters(**parameters(plan, place))

    @classmethod
    def affinity(cls) -> int:
        return 2  # where there is no Slurm, sbatch says so

    def _num_tasks(self) -> int:
        return 1  # nodes may be a range, and nobody waits for results

    def text(self) -> str:
        """Return the script that would be submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "") + "\n"

    def _submit_command(self, command: str) -> Any:
        script = utils.JobPaths.get_first_id_independent_folder(self.folder) / f"submit-{time.time_ns():x}.sh"
        script.write_text(self._make_submission_file_text(command, ""), encoding="utf-8")
        JobRecord("", str(script), round(time.time(), 3)).write(self._run)
        job_id = _sbatch(script)
        JobRecord(job_id, str(script), round(time.time(), 3)).write(self._run)
        return self.job_class(folder=self.folder, job_id=job_id, tasks=[0])


def _sbatch(script: Path) -> str:
    """Submit a script, and give the job's number. After an answer that never came the queue is asked before
    anything is tried again."""
    until = time.monotonic() + _SECONDS_TO_FIND_OUT
    written = re.findall(r"^#SBATCH --([a-z0-9-]+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    variables = inherited.environment(os.environ, written)
    while True:
        try:
            answer = client.call(["sbatch", str(script)], seconds=60.0, environment=variables)
            return Executor._get_job_id_from_submission_command(answer)
        except ControllerUnreachableError:
            if time.monotonic() > until:
                raise
            if (job_id := find(script, until)) is not None:
                return job_id


def find(script: Path, until: float) -> str | None:
    """Return the number of the job with this script, once the controller answers; None where it has none.

    Raises ControllerUnreachableError where it does not answer until then.
    """
    while True:
        try:
            return next((entry.job_id for entry in queue().values() if entry.script == str(script)), None)
        except ControllerUnreachableError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


def parameters(plan: Plan, place: Place) -> dict[str, Any]:
    """Return what submitit is told: the options of the rendered script, in its words."""
    options = sbatch.options(plan)
    name, nodes, cores = options.pop("job-name"), options.pop("nodes"), options.pop("cpus-per-task")
    signal_seconds = int(options.pop("signal", f"@{sbatch.SIGNAL_SECONDS}").rpartition("@")[2])
    tasks = options.pop("ntasks-per-node", "")
    options.pop("open-mode")  # submitit's own
    return {
        "job_name": name,
        "nodes": nodes,
        "ntasks_per_node": int(tasks) if tasks else None,
        "cpus_per_task": int(cores),
        "time": int(options.pop("time")) if "time" in options else None,
        "signal_delay_s": signal_seconds,
        "wckey": None,
        "stderr_to_stdout": True,
        "setup": sbatch.before(plan, place),
        "srun_args": sbatch.srun_options(plan, place),
        "additional_parameters": {option: value or True for option, value in options.items()},
    }


def place_of(run: RunDirectory, python: str, code: Path | None) -> Place:
    """Return the run's own place, as every node sees it. Raises ConfigurationError for a path that Slurm
    could not carry."""
    return Place(str(run.path), str(run.rendered), python, str(code) if code else "")


def dry_run(run: RunDirectory, plan: Plan, python: str, code: Path | None) -> str:
    """Return the script that `submit` would hand to sbatch. Nothing is written, and Slurm is not asked."""
    return Executor(run, plan, place_of(run, python, code)).text()


def submit(
    run: RunDirectory, plan: Plan, python: str, code: Path, more: Iterable[tuple[str, str]] = ()
) -> str:
    """Submit a run, and give the job's number; a job of it that is there already is not submitted again.

    `more` are further options of sbatch.
    Raises SchedulerError with what Slurm says against it, RunInUseError where a job of the run is there.
    """
    refuse_second(run)
    place = place_of(run, python, code)
    requested = plan.model_copy(
        update={"slurm": plan.slurm.model_copy(update={"options": plan.slurm.options | dict(more)})}
    )
    try:
        executor = Executor(run, requested, place)
        folder(run).mkdir(parents=True, exist_ok=True)
        return str(executor.submit(NodeTask(str(run.path))).job_id)
    except PermissionError as error:
        raise StorageError(f"{error.filename}: {error.strerror}; name another place with --run-dir") from None
    except utils.FailedSubmissionError as error:
        raise SchedulerError(first_line(error)) from None


def submit_array(
    sweep: Path, runs: Sequence[RunDirectory], plan: Plan, python: str, code: Path, parallel: int | None
) -> str:
    """Submit many runs as one array, task I being the run I, at most `parallel` at a time; the array's
    number.

    `sweep` is the directory above the runs, which keeps what is submitted.
    """
    above = RunDirectory(sweep)
    executor = Executor(above, plan, place_of(above, python, code))
    executor.parameters |= {"map_count": len(runs), "array_parallelism": parallel or len(runs)}
    folder(above).mkdir(parents=True, exist_ok=True)
    pickles = []
    for run in runs:
        delayed = utils.DelayedSubmission(NodeTask(str(run.path)))
        delayed.set_timeout(executor.parameters.get("time") or 0, 0)
        pickles.append(folder(above) / f"{run.path.name}-{time.time_ns():x}.pkl")
        delayed.dump(pickles[-1])
    job = executor._submit_command(executor._submitit_command_str)
    for index, pickle in enumerate(pickles):
        utils.JobPaths(folder(above), job_id=f"{job.job_id}_{index}").move_temporary_file(
            pickle, "submitted_pickle"
        )
    return str(job.job_id)


def refuse_second(run: RunDirectory) -> None:
    """Raise RunInUseError where the run has a job that waits or runs; after a submission without an answer
    Slurm is asked for it first."""
    known = JobRecord.read(run)
    if known is None:
        return
    job_id = known.job_id
    if not job_id:
        existing = find(Path(known.script), time.monotonic() + _SECONDS_TO_FIND_OUT)
        if existing is None:
            return
        JobRecord(existing, known.script, known.time).write(run)
        job_id = existing
    entry = queue([job_id]).get(job_id)
    if is_live(entry):
        assert entry is not None
        if entry.is_held:
            raise RunInUseError(
                f"{run.path} is job {job_id}, which Slurm holds ({entry.reason}); let it go with: "
                f"scontrol release {job_id}"
            )
        raise RunInUseError(
            f"{run.path} is job {job_id} already ({entry.state.lower()}); see `launcher status "
            f"{run.path.name}`"
        )
