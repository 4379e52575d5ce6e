"""What a job takes along of the environment that it is submitted from, and the options that Slurm takes once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.errors import ConfigurationError
from launcher.job.load import load
from launcher.launch.slurm.inherited import environment
from launcher.planner.search import plan_job as decide
from launcher.render import sbatch
from launcher.render.launch_paths import Place

JOB = (
    "name: a\nmodel: {{name: org/model}}\ndata: {{train: {{path: train.txt}}, text: text}}\ncluster: "
    "{{{cluster}}}\n"
)
OWN = {
    "PATH": "/bin",
    "SLURM_CONF": "/etc/slurm.conf",
    "SBATCH_ACCOUNT": "physics",
    "HF_HOME": "/cache",
    "SLURM_CLUSTERS": "one",
}
WRITTEN = ("job-name", "nodes", "mem", "gres", "cpus-per-task", "open-mode", "requeue", "signal")


@pytest.mark.parametrize(
    "sign",
    ["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "SLURM_PROCID", "SLURMD_NODENAME"],
)
def test_inside_a_job_nothing_of_it_is_taken_along(sign: str) -> None:
    of_the_job = {
        sign: "1234",
        "SLURM_MEM_PER_CPU": "4000",
        "SLURM_MEM_PER_GPU": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_NTASKS": "8",
    }
    of_the_job |= {
        "SLURM_CPU_BIND": "mask_cpu:0x1",
        "SLURM_GPU_BIND": "none",
        "SLURM_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "2",
    }
    of_the_job |= {
        "SBATCH_CPU_BIND": "none",
        "SBATCH_MEM_BIND": "none",
        "PMI_RANK": "0",
        "PMIX_RANK": "0",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    of_the_job |= {
        "CUDA_VISIBLE_DEVICES": "1",
        "ROCR_VISIBLE_DEVICES": "1",
        "ZE_AFFINITY_MASK": "1",
        "RANK": "3",
        "MASTER_ADDR": "n1",
    }
    assert environment({**OWN, **of_the_job}, WRITTEN) == OWN


@pytest.mark.parametrize(
    ("value", "stays"),
    [("/tmp/job.1234", False), ("/scratch/1234/tmp", False), ("/tmp", True), ("/tmp/12345", True)],
)
def test_a_directory_for_one_job_alone_is_left_out(value: str, stays: bool) -> None:
    assert ("TMPDIR" in environment({"SLURM_JOB_ID": "1234", "TMPDIR": value}, ())) is stays


def test_outside_a_job_what_a_user_sets_counts() -> None:
    mine = {
        **OWN,
        "SLURM_CPU_BIND": "cores",
        "SBATCH_QOS": "high",
        "CUDA_VISIBLE_DEVICES": "0",
        "TMPDIR": "/tmp/me",
        "MASTER_PORT": "1",
    }
    mine |= {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    assert environment(mine, WRITTEN) == mine


def test_the_script_goes_before_the_variables_of_sbatch() -> None:
    """sbatch itself has them the other way round."""
    mine = {
        "SBATCH_MEM_PER_NODE": "1",
        "SBATCH_MEM_PER_CPU": "1",
        "SBATCH_GPUS": "1",
        "SBATCH_GPUS_PER_NODE": "1",
        "SBATCH_NO_REQUEUE": "1",
    }
    mine |= {
        "SBATCH_CPUS_PER_GPU": "1",
        "SBATCH_ARRAY_INX": "1-2",
        "SBATCH_WAIT": "1",
        "SBATCH_JOB_NAME": "x",
        "SBATCH_SIGNAL": "x",
    }
    kept = {"SBATCH_ACCOUNT": "physics", "SBATCH_PARTITION": "low", "SBATCH_TIMELIMIT": "5"}
    assert environment({**mine, **kept}, WRITTEN) == kept
    assert environment(kept, [*WRITTEN, "account", "partition", "time"]) == {}


def test_a_rank_that_submits_hands_on_nothing_of_its_place() -> None:
    rank = {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LAUNCHER_ATTEMPT": "1",
        "ACCELERATE_USE_FSDP": "true",
    }
    assert environment({**OWN, **rank, "LAUNCHER_WARM": "0"}, ()) == {**OWN, "LAUNCHER_WARM": "0"}


def loaded(folder: Path, cluster: str, profile: str = "") -> dict[str, str]:
    """The options that sbatch would get."""
    (folder / "train.txt").write_text("a line\n")
    (folder / "profile.yaml").write_text(profile or "cluster: {}\n")
    (folder / "job.yaml").write_text(JOB.format(cluster=f"profile: ./profile.yaml, {cluster}"))
    return sbatch.options(decide(load(folder / "job.yaml", []), 2, local=False))


@pytest.mark.parametrize(
    ("cluster", "said"),
    [
        (
            "mem: 10G, sbatch: {mem-per-cpu: 4G}",
            "cluster.sbatch.mem-per-cpu = '4G': Slurm takes this or cluster.mem, not both; leave one out",
        ),
        (
            "mem: 10G, sbatch: {mem-per-gpu: 4G}",
            "cluster.sbatch.mem-per-gpu = '4G': Slurm takes this or cluster.mem, not both",
        ),
        (
            "sbatch: {mem-per-cpu: 4G, mem-per-gpu: 8G}",
            "cluster.sbatch.mem-per-gpu = '8G': Slurm takes this or cluster.sbatch.mem-per-cpu",
        ),
        (
            "sbatch: {core-spec: 1, thread-spec: 1}",
            "cluster.sbatch.thread-spec = 1: Slurm takes this or cluster.sbatch.core-spec",
        ),
        (
            "sbatch: {hint: nomultithread, threads-per-core: 1}",
            "cluster.sbatch.threads-per-core = 1: Slurm takes this or",
        ),
        (
            "nodelist: n1, sbatch: {nodefile: f}",
            "cluster.sbatch.nodefile = 'f': Slurm takes this or cluster.nodelist, not both",
        ),
        ("exclusive: true, sbatch: {oversubscribe: true}", "Slurm takes this or cluster.exclusive, not both"),
        (
            "exclusive: true, sbatch: {exclusive: user}",
            "cluster.sbatch.exclusive = 'user': Slurm takes this or cluster.exclusive",
        ),
        (
            "sbatch: {mem: 4G}",
            "cluster.sbatch.mem = '4G': has a key of its own, which the plan goes by; write it as cluster.mem",
        ),
        (
            "nodes: 2, sbatch: {nodes: 3}",
            "cluster.sbatch.nodes = 3: has a key of its own, which the plan goes by; write it as "
            "cluster.nodes",
        ),
        (
            "sbatch: {time: 60}",
            "cluster.sbatch.time = 60: has a key of its own, which the plan goes by; write it as "
            "cluster.time_limit",
        ),
        ("sbatch: {cpus-per-gpu: 6}", "write it as cluster.cpus_per_node"),
        (
            "gpus_per_node: 2, sbatch: {gres: 'gpu:h100:2'}",
            "write cluster.gpus_per_node (and gpu_type), and the rest here",
        ),
        ("sbatch: {gpus-per-task: 1}", "write it as cluster.gpus_per_node"),
        ("sbatch: {no-requeue: true}", "write it as cluster.requeue"),
        ("sbatch: {ntasks: 8}", "say how many ranks by cluster.ranks_per_node; leave it out"),
        ("sbatch: {array: 0-3}", "for several runs see `launcher sweep`; leave it out"),
        ("sbatch: {parsable: true}", "launcher reads sbatch's answer, and goes by it; leave it out"),
        (
            "sbatch: {signal: USR1@60}",
            "is not the job's to give: launcher has itself warned before the time limit",
        ),
        ("sbatch: {t: 60}", "write it as cluster.time_limit"),
        (
            "sbatch: {mem_per_cpu: 4G}",
            "cluster.sbatch.mem_per_cpu = '4G': options stand here by their long names; write mem-per-cpu",
        ),
        ("sbatch: {nodel: n1}", "write it as cluster.nodelist"),
    ],
)
def test_what_slurm_takes_once_is_refused_twice(cluster: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(tmp_path, f"{cluster}, gpus_per_node: 2" if "gpus_per_node" not in cluster else cluster)
    assert said in str(caught.value) and len(caught.value.problems) == 1


def test_all_of_it_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        loaded(tmp_path, "mem: 1G, sbatch: {mem-per-cpu: 1G, time: 5, wait: true}")
    assert [problem.key for problem in caught.value.problems] == [
        "cluster.sbatch.time",
        "cluster.sbatch.wait",
        "cluster.sbatch.mem-per-cpu",
    ]


@pytest.mark.parametrize(
    ("job", "profile", "there", "absent"),
    [
        ("sbatch: {mem-per-cpu: 4G}", "mem: 200G", {"mem-per-cpu": "4G"}, "mem"),
        ("mem: 5G", "sbatch: {mem-per-cpu: 4G, nice: 3}", {"mem": "5G", "nice": "3"}, "mem-per-cpu"),
        (
            "mem: 5G, sbatch: {nice: 1}",
            "sbatch: {mem-per-gpu: 4G}",
            {"mem": "5G", "nice": "1"},
            "mem-per-gpu",
        ),
        ("sbatch: {mem-per-cpu: false}", "mem: 5G", {"mem": "5G"}, "mem-per-cpu"),
        ("sbatch: {oversubscribe: true}", "exclusive: true", {"oversubscribe": ""}, "exclusive"),
        ("exclusive: true", "sbatch: {exclusive: user}", {"exclusive": ""}, "oversubscribe"),
        ("sbatch: {exclusive: user}", "exclusive: true", {"exclusive": "user"}, "oversubscribe"),
        ("nodelist: n1", "sbatch: {nodefile: all.txt}", {"nodelist": "n1"}, "nodefile"),
    ],
)
def test_a_profile_gives_way_to_what_excludes_it(
    job: str, profile: str, there: dict[str, str], absent: str, tmp_path: Path
) -> None:
    options = loaded(tmp_path, f"gpus_per_node: 0, {job}", f"cluster: {{{profile}}}\n")
    assert there.items() <= options.items() and absent not in options


def test_what_is_no_gpu_stands_beside_the_gpus(tmp_path: Path) -> None:
    assert (
        loaded(tmp_path, "gpus_per_node: 2, sbatch: {gres: 'nvme:1,ramdisk:2'}")["gres"]
        == "gpu:2,nvme:1,ramdisk:2"
    )
    assert loaded(tmp_path, "gpus_per_node: 0, sbatch: {gres: 'nvme:1'}")["gres"] == "nvme:1"


@pytest.mark.parametrize(
    ("cluster", "stays"),
    [("mem: 5G", {"SLURM_MEM_PER_NODE"}), ("sbatch: {mem-per-cpu: 5G}", {"SLURM_MEM_PER_CPU"}), ("", set())],
)
def test_the_script_forgets_what_srun_would_go_by(cluster: str, stays: set[str], tmp_path: Path) -> None:
    """But for what this job's own options have Slurm set."""
    (tmp_path / "train.txt").write_text("a line\n")
    (tmp_path / "job.yaml").write_text(JOB.format(cluster=f"gpus_per_node: 0, {cluster}"))
    plan = decide(load(tmp_path / "job.yaml", []), 2, local=False)
    lines = [
        line
        for line in sbatch.before(plan, Place("/RUN", "/RUN/rendered", "/PYTHON"))
        if line.startswith("unset ")
    ]
    variables = {f"SLURM_MEM_PER_{what}": "1" for what in ("CPU", "GPU", "NODE")} | {
        "SLURM_CPU_BIND_LIST": "0x1",
        "PMI_RANK": "1",
    }
    variables |= {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "2"}
    seen = subprocess.run(
        ["bash", "-uc", "; ".join([*lines, "env"])],
        env={**variables, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    left = {name for name in variables if f"\n{name}=" in f"\n{seen.stdout}"}
    assert left == stays | {"SLURM_JOB_ID", "SLURM_CPUS_PER_TASK"}
