"""A site's profile from what Slurm prints, with what odd sites print too."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from launcher.cli import main as cli
from launcher.errors import ConfigurationError, SchedulerError
from launcher.job import profile
from launcher.launch.slurm import site as sites
from launcher.launch.slurm.site import Partition, Site, count_gpus, read_partitions, seconds
from launcher.launch.slurm.site_profile import text

LIMITLESS = "MaxNodes=UNLIMITED MaxTime=UNLIMITED"


def node(
    partition: str,
    name: str,
    gres: str = "(null)",
    cpus: str = "64",
    memory: str = "512000",
    threads: str = "1",
) -> str:
    return "\x1f".join([partition, name, cpus, memory, gres, threads])


def partition(name: str, more: str = "", **nodes: str) -> Partition:
    """One partition of nodes by their gres."""
    described = f"PartitionName={name} Default=NO State=UP TotalNodes={len(nodes)} {more or LIMITLESS}"
    (found,) = read_partitions(described, "\n".join(node(name, host, gres) for host, gres in nodes.items()))
    return found


@pytest.mark.parametrize(
    ("gres", "counts"),
    [
        ("(null)", {}),
        ("", {}),
        ("gpu:2", {"": 2}),
        ("gpu", {"": 1}),
        ("gpu:a100", {"a100": 1}),
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:a100:4(S:0,2),gpu:v100:2(S:1)", {"a100": 4, "v100": 2}),
        ("gpu:nvidia_a100-sxm4-80gb:8,lustre:no_consume:4G", {"nvidia_a100-sxm4-80gb": 8}),
        ("gpu:1g.10gb:7(S:0),shard:64,mps:400", {"1g.10gb": 7}),
        ("craynetwork:4", {}),
        ("gpu:,:gpu:3,;rm -rf", {"": 1}),
    ],
)
def test_gpus_of_a_node(gres: str, counts: dict[str, int]) -> None:
    assert count_gpus(gres) == counts


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("UNLIMITED", None),
        ("", None),
        ("never", None),
        ("1-x", None),
        ("00:02:00", 120),
        ("30", 1800),
        ("30:30", 1830),
        ("2-12:00:00", 216_000),
        ("7-00", 604_800),
        ("1-06:30", 109_800),
        ("00:00:00", None),
    ],
)
def test_times(time: str, expected: float | None) -> None:
    assert seconds(time) == expected


def test_nodes_that_differ() -> None:
    nodes = [
        node("mixed", "a", "gpu:a100:4"),
        node("mixed", "b", "gpu:v100:8", cpus="128+", memory="1024000", threads="2"),
        node("mixed", "c"),
    ]
    described = (
        "PartitionName=mixed Default=YES State=DRAIN TotalNodes=3 MaxNodes=2 MaxTime=1-00:00:00 "
        "AllowAccounts=one,two"
    )
    (found,) = read_partitions(described, "\n".join([*nodes, "garbage", "", "a\x1fb"]))
    assert (found.max_nodes, found.max_time, found.cpus_per_node, found.memory_per_node) == (
        2,
        86_400,
        128,
        1_024_000,
    )
    assert (found.gpus_per_node, found.gpu_types, found.is_uniform, found.threads_per_core) == (
        8,
        ("a100", "v100"),
        False,
        2,
    )
    assert (found.is_default, found.is_up, found.accounts) == (True, False, ("one", "two"))


def test_a_partition_without_nodes_and_what_is_none() -> None:
    (empty,) = read_partitions(
        "PartitionName=empty TotalNodes=0\n\nNo partitions in the system\nPartitionName=", ""
    )
    assert (empty.max_nodes, empty.cpus_per_node, empty.gpus_per_node, empty.usual_gpus) == (None, None, 0, 0)


def read_back(tmp_path: Path, site: Site, chosen: Partition | None) -> tuple[profile.Profile, str]:
    written = text(site, chosen)
    (tmp_path / "site.yaml").write_text(written)
    return profile.read(tmp_path / "site.yaml")[0], written


@pytest.mark.parametrize(
    "name",
    ["main", "yes", "NO", "null", "123", "1e3", "a: b", "# no", "{x}", "gpu'\"", "ünïcode", "-", "a.b-c_d"],
)
def test_hostile_names_are_read_back_as_they_are(name: str, tmp_path: Path) -> None:
    one = Partition(name, True, True, 4, 4, 86_400.0, 64, 512_000, 8, 8, ("a100",), True)
    found, _ = read_back(tmp_path, Site("site", (one,), name, True), one)
    assert (found.cluster.partition, found.cluster.account, list(found.limits)) == (name, name, [name])
    limits = found.limits[name]
    assert (limits.max_nodes, limits.max_time, limits.gpus_per_node, limits.cpus_per_node) == (
        4,
        86_400,
        8,
        64,
    )


def test_gpus_that_are_called_alike_everywhere_are_asked_for_by_name(tmp_path: Path) -> None:
    fast, cores = partition("fast", a="gpu:h100:8", b="gpu:h100:8"), partition("cores", c="(null)")
    found, _ = read_back(tmp_path, Site("site", (fast, cores), None, True), fast)
    assert (found.cluster.gpus_per_node, found.cluster.gpu_type, found.cluster.gpu_option) == (
        8,
        "h100",
        "gres",
    )


def test_gpus_of_several_names_are_left_to_the_job(tmp_path: Path) -> None:
    fast, old = (
        partition("fast", a="gpu:h100:8"),
        partition("old", b="gpu:v100:4", c="gpu:v100:2", d="gpu:v100:4"),
    )
    found, written = read_back(tmp_path, Site("site", (fast, old), None, True), old)
    assert (found.cluster.gpus_per_node, found.cluster.gpu_type) == (4, None)
    assert (
        "# gpu_type: any of them unless named: h100, v100" in written
        and "nodes differ, these are the largest" in written
    )


def test_a_name_of_gpus_that_no_job_file_takes_is_left_out(tmp_path: Path) -> None:
    one = partition("one", a="gpu:a b\x07:2")
    found, written = read_back(tmp_path, Site("site", (one,), None, True), one)
    assert found.cluster.gpu_type is None and "a b?" in written


def test_slurm_without_gpus_and_without_a_default(tmp_path: Path) -> None:
    found, written = read_back(tmp_path, Site("site", (partition("one", a="gpu:8"),), None, False), None)
    assert (found.cluster.gpus_per_node, found.cluster.partition, found.cluster.account) == (0, None, None)
    assert "the site has no default" in written


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs of Slurm's names that print what the files beside them say."""
    (tmp_path / "bin").mkdir()
    for name, file in (("scontrol", 'scontrol-"${@: -1}"'), ("sinfo", "sinfo"), ("sacctmgr", "none")):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/bash\ncat "{tmp_path}"/{file} || {{ echo "{name}: error: no" >&2; exit 1; }}\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    (tmp_path / "scontrol-config").write_text("ClusterName = ../a b\nGresTypes = bandwidth,gpu\nodd line\n")
    (tmp_path / "scontrol-partition").write_text(
        f"PartitionName=one Default=NO State=UP TotalNodes=1 {LIMITLESS}\n"
    )
    (tmp_path / "sinfo").write_text(node("one", "a", "gpu:2") + "\n")
    return tmp_path


def test_a_cluster_without_accounting(slurm: Path) -> None:
    site = sites.ask()
    assert (site.name, site.account, site.takes_gres, site.default) == ("a-b", None, True, None)


def test_the_account_of_a_user_that_the_system_does_not_know(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 4_000_000_000)
    assert sites.ask().account is None


def test_no_partition_to_see(slurm: Path) -> None:
    (slurm / "scontrol-partition").write_text("")
    with pytest.raises(SchedulerError, match="shows no partition to this user"):
        sites.ask()


def test_an_unknown_partition_gets_the_nearest(slurm: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="--partition = 'ome': the site has no such partition; it has one"
    ):
        sites.ask().partition("ome")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(list(arguments))
    return int(leaving.value.code or 0)


def test_the_command_refuses_to_overwrite(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile") == 0
    shown = capsys.readouterr()
    path = slurm / "configuration" / "launcher" / "profiles" / "a-b.yaml"
    assert f"wrote {path}; a job takes it with cluster: {{profile: a-b}}" in shown.out
    assert "no default partition" in shown.err
    path.write_text("kept: true")
    assert call("profile") == 2
    assert "is there already; replace it with --force" in capsys.readouterr().err
    assert path.read_text() == "kept: true"
    assert call("profile", "--force", "--partition", "one", "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] == "a-b"
    assert yaml.safe_load(path.read_text())["cluster"]["partition"] == "one"


def test_another_place(slurm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile", "--out", str(slurm / "deep" / "mine.yaml")) == 0
    assert f"cluster: {{profile: {slurm}/deep/mine.yaml}}" in capsys.readouterr().out


def test_without_slurm(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert call("profile") == 11
    assert "scontrol is not on this machine" in capsys.readouterr().err
