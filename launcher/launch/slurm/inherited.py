"""The environment a job takes along: nothing of another job that it is submitted from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from launcher.job.slurm_options import EXCLUSIVE

_SIGNS_OF_A_JOB = {
    *("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_JOB_NODELIST", "SLURM_NODELIST"),
    *("SLURM_PROCID", "SLURM_NODEID", "SLURM_TASK_PID", "SLURM_SUBMIT_DIR", "SLURMD_NODENAME"),
}
"""What Slurm sets in each job, and nobody by hand; one is enough, as some shells keep only a part."""
_KEPT = (
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_CLUSTERS",
    "SLURM_JWT",
    "SLURM_TIME_FORMAT",
    "SLURM_BITSTR_LEN",
)
"""Variables of Slurm's that it sets in no job of itself: they say which cluster, as whom, and how."""
_OF_SLURM = (
    "SLURM_",
    "SLURMD_",
    "SRUN_",
    "SBATCH_CPU_BIND",
    "SBATCH_MEM_BIND",
    "SUBMITIT_",
    "PMI_",
    "PMIX_",
    "PMI2_",
    "OMPI_",
    "PRTE_",
)
_DEVICES = (
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
)
_OF_RANKS = {
    *(
        "RANK",
        "LOCAL_RANK",
        "GROUP_RANK",
        "ROLE_RANK",
        "ROLE_NAME",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
    ),
    *(
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "LAUNCHER_ATTEMPT",
        "LAUNCHER_RUN_DIRECTORY",
        "LAUNCHER_PARENT",
    ),
    *("LAUNCHER_STORE", "LAUNCHER_SECRET_FILE"),
}
_BEGINNINGS_OF_RANKS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR", "XDG_RUNTIME_DIR")
_NAMED_OTHERWISE = {"mem": "MEM_PER_NODE", "time": "TIMELIMIT", "array": "ARRAY_INX"}
_ALWAYS = {"array", "wait", "no-requeue", "requeue", "error"}
"""What would make another job of a run than the one that was planned, or have sbatch wait for its end."""
_ASKED_TOGETHER = (
    *EXCLUSIVE,
    {"gres", "gpus-per-node", "gpus", "gpus-per-task"},
    {"cpus-per-task", "cpus-per-gpu", "tres-per-task"},
)
"""Sets of options of which one in the script answers for all."""


def environment(environ: Mapping[str, str], written: Iterable[str]) -> dict[str, str]:
    """Return the environment to call sbatch in, from one's own. `written` are the options that the batch
    script says itself.

    Inside a job Slurm's variables of that job are left out: what the next one does not set anew, srun would
    take for its own options. What a user sets for sbatch (SBATCH_ACCOUNT) counts, but for what the script
    says: sbatch has its variables go before that, so that another partition than the job file's would be
    taken in silence.
    """
    kept = {name: value for name, value in environ.items() if name not in _variables_of(written)}
    if "TORCHELASTIC_RUN_ID" in environ or "LAUNCHER_ATTEMPT" in environ:
        kept = {
            name: value
            for name, value in kept.items()
            if name not in _OF_RANKS and not name.startswith(_BEGINNINGS_OF_RANKS)
        }
    if not _SIGNS_OF_A_JOB & environ.keys():
        return kept
    job = environ.get("SLURM_JOB_ID") or environ.get("SLURM_JOBID") or "no number"
    own = re.compile(rf"(?<!\d){re.escape(job)}(?!\d)")
    return {
        name: value
        for name, value in kept.items()
        if (name in _KEPT or not name.startswith(_OF_SLURM))
        and name not in (*_DEVICES, *_OF_RANKS)
        and not (
            name in _TEMPORARY and own.search(value)
        )  # the site made it for that job, and removes it with it
    }


def _variables_of(written: Iterable[str]) -> set[str]:
    """Return what sbatch would take from the environment for an option that the script says, or for one that
    excludes it."""
    options = {*written} | _ALWAYS
    options |= {other for group in _ASKED_TOGETHER if options & group for other in group}
    return {f"SBATCH_{_NAMED_OTHERWISE.get(option, option.replace('-', '_').upper())}" for option in options}
