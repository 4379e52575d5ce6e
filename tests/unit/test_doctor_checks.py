"""`launcher doctor`: what it makes of one machine."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from launcher.doctor import controller, directory, gpus, local, machine
from launcher.doctor.finding import Finding, ok
from tests.unit.programs import Programs, programs

__all__ = ["programs"]
PLACE = Path("/shared")


class TestGpus:
    GOOD = "0, NVIDIA H100, 560.1, 4, 81559, 40, 0, No, 0x0000000000000001"

    def judged(self, line: str, xid: list[str] | None = None) -> Finding:
        return gpus.judge(gpus.read(line + "\n", list(gpus._FIELDS)), xid)

    @pytest.mark.parametrize(
        ("line", "level", "said"),
        [
            (
                GOOD,
                "ok",
                "1 x NVIDIA H100, driver 560.1, no ECC error, the log of Xid errors is not readable",
            ),
            (GOOD.replace(" 40, 0,", " 40, 2,"), "failed", "GPU 0: 2 uncorrected ECC errors"),
            (GOOD.replace("No", "Yes"), "failed", "GPU 0: memory pages wait to be retired"),
            (GOOD.replace("0001", "0060"), "warning", "GPU 0: too hot"),
            (GOOD.replace("0001", "0080"), "warning", "GPU 0: too little power"),
            (GOOD.replace(" 4, 81559", " 70000, 81559"), "warning", "GPU 0: 70000 MiB are in use"),
            (
                GOOD.replace(" 40, 0, No, 0x0000000000000001", " [N/A], [N/A], [N/A], [Not Supported]"),
                "ok",
                "1 x NVIDIA H100",
            ),
            ("", "ok", "none (nvidia-smi lists none)"),
            ("odd", "ok", "none (nvidia-smi lists none)"),
        ],
    )
    def test_health(self, line: str, level: str, said: str) -> None:
        found = self.judged(line)
        assert found.level == level and said in found.found
        assert bool(found.advice) == (level != "ok")

    def test_errors_in_the_kernels_log(self) -> None:
        log = (
            "x\n[1.2] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\nNVRM: Xid "
            "(PCI:0000:3b:00): 79, again\n"
        )
        assert gpus.xids(log) == ["79 on PCI:0000:3b:00"] and gpus.xids("") == [] and gpus.xids(None) is None
        found = self.judged(self.GOOD, gpus.xids(log))
        assert (
            found.level == "failed"
            and "Xid 79 on PCI:0000:3b:00" in found.found
            and "cluster.exclude" in found.advice
        )

    def test_none_here(self, programs: Programs) -> None:
        assert gpus.check() == (ok("GPUs", "none (no nvidia-smi here)"), 0)

    def test_a_field_that_the_driver_does_not_know_is_left_out(self, programs: Programs) -> None:
        refuse = 'Field "retired_pages.pending" is not a valid field to query.'
        programs(
            **{
                "nvidia-smi": f"case $1 in *retired*) echo '{refuse}'; exit 2;; esac\necho "
                f"'{self.GOOD.replace(' No,', '')}'"
            },
            dmesg="echo quiet",
        )
        found, number = gpus.check()
        assert number == 1 and found.level == "ok" and found.found.endswith("no Xid error")

    def test_an_older_driver_has_another_name_for_what_slows_a_gpu_down(self, programs: Programs) -> None:
        refuse = 'Field "clocks_event_reasons.active" is not a valid field to query.'
        hot = self.GOOD.replace("0001", "0060")
        programs(
            **{"nvidia-smi": f"case $1 in *event*) echo '{refuse}'; exit 2;; esac\necho '{hot}'"},
            dmesg="echo quiet",
        )
        found, _ = gpus.check()
        assert found.level == "warning" and "too hot" in found.found

    @pytest.mark.parametrize(
        ("script", "said"),
        [("echo 'No devices were found'; exit 6", "No devices were found"), ("exit 9", "code 9")],
    )
    def test_nvidia_smi_that_does_not_answer(self, programs: Programs, script: str, said: str) -> None:
        programs(**{"nvidia-smi": script})
        found, number = gpus.check()
        assert (found.level, number) == ("failed", 0) and said in found.found

    def test_nvidia_smi_that_hangs(self, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpus, "_SECONDS", 0.2)
        programs(**{"nvidia-smi": "exec sleep 600"})
        assert "not within 0.2 s" in gpus.check()[0].found


class TestSlurmHere:
    def all_but(self, *absent: str, **scripts: str) -> dict[str, str]:
        return {name: "true" for name in controller._COMMANDS if name not in absent} | scripts

    def test_no_slurm(self, programs: Programs) -> None:
        assert [finding.level for finding in controller.check()] == ["ok"]
        assert [finding.level for finding in controller.check(is_needed=True)] == ["failed"]

    def test_half_of_it(self, programs: Programs) -> None:
        programs(**self.all_but("scancel"))
        (found,) = controller.check(is_needed=True)
        assert found.level == "failed" and found.found.startswith("scancel are not in PATH")

    @pytest.mark.parametrize(
        ("ping", "level"),
        [
            ("echo 'Slurmctld(primary) at a is UP'", "ok"),
            ("echo 'Slurmctld(primary) at a is DOWN'; echo 'Slurmctld(backup) at b is UP'", "warning"),
            ("echo 'Slurmctld(primary) at a is DOWN'", "failed"),
            ("true", "failed"),
            ("echo 'scontrol: error: no'; exit 1", "failed"),
        ],
    )
    def test_the_controller(
        self, programs: Programs, monkeypatch: pytest.MonkeyPatch, ping: str, level: str
    ) -> None:
        monkeypatch.setattr(controller, "_SECONDS_BEFORE_ASKING_AGAIN", (0.0, 0.0, 0.0))
        programs(**self.all_but(scontrol=f"[ $1 = ping ] || exit 0\n{ping}"))
        assert controller.check(is_needed=True)[0].level == level
        assert controller.check()[0].level == ("warning" if level == "failed" else level), (
            "nobody asked for it"
        )

    @pytest.mark.parametrize(
        ("scripts", "level", "said"),
        [
            (
                {"scontrol": "echo 'scontrol: error: Invalid credential' >&2; exit 1"},
                "failed",
                "Invalid credential",
            ),
            ({"scontrol": "echo AuthType = auth/slurm"}, "ok", "auth/slurm"),
            ({"scontrol": "true"}, "ok", "its programs are not here"),
            ({"scontrol": "true", "munge": "true", "unmunge": "true"}, "ok", "seals and opens"),
            (
                {
                    "scontrol": "true",
                    "munge": "echo 'munge: Error: Failed to access socket' >&2; exit 6",
                    "unmunge": "true",
                },
                "failed",
                "socket",
            ),
            ({"scontrol": "true", "munge": "true", "unmunge": "exit 3"}, "failed", "unmunge"),
            (
                {
                    "scontrol": "echo 'AuthInfo = socket=/a/b,x=1'",
                    "munge": '[ "$2" = --socket=/a/b ]',
                    "unmunge": "true",
                },
                "ok",
                "seals",
            ),
        ],
    )
    def test_munge(self, programs: Programs, scripts: dict[str, str], level: str, said: str) -> None:
        programs(**scripts)
        (found,) = controller.munge()
        assert found.level == level and said in found.found


class TestMachine:
    def test_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = machine.versions()
        assert known["python"] == ".".join(map(str, sys.version_info[:3])) and known["torch"]
        assert machine.check_versions(known).level == "ok"
        assert machine.check_versions(known | {"deepspeed": ""}).level == "ok"
        assert machine.check_versions(known | {"torch": ""}).found.startswith("torch not installed")
        monkeypatch.setattr(machine, "_OPTIONAL", ("surely-not-installed",))
        assert machine.versions()["surely-not-installed"] == ""

    def test_caches(self, tmp_path: Path) -> None:
        assert machine.check_caches({"XDG_CACHE_HOME": str(tmp_path / "deep" / "er")}).level == "ok"
        assert list(tmp_path.iterdir()) == []
        found = machine.check_caches({"XDG_CACHE_HOME": str(tmp_path), "HF_HUB_CACHE": "/proc"})
        assert found.level == "failed" and "HF cache /proc" in found.found and "HF_HOME" in found.advice
        found = machine.check_caches({"XDG_CACHE_HOME": "/proc", "HF_HOME": str(tmp_path)})
        assert found.level == "failed" and "XDG_CACHE_HOME" in found.advice

    def test_interface(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "interfaces", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.1"})
        for value in ("", "eth0", "eth", "^docker", "eth0,eth1", "=eth0"):
            assert machine.check_interface({"NCCL_SOCKET_IFNAME": value}).level == "ok"
        found = machine.check_interface({"GLOO_SOCKET_IFNAME": "ib0"})
        assert found.level == "failed" and "there are eth0" in found.found
        monkeypatch.setattr(machine, "interfaces", lambda: {"lo": "127.0.0.1"})
        assert machine.check_interface({}).level == "warning"

    @pytest.mark.parametrize(
        ("said", "level"),
        [("echo yes", "ok"), ("echo no", "warning"), ("exit 1", "ok"), ("exec sleep 600", "ok")],
    )
    def test_clock(self, programs: Programs, monkeypatch: pytest.MonkeyPatch, said: str, level: str) -> None:
        monkeypatch.setattr(machine, "_SECONDS_TO_ASK", 0.5 if "sleep" in said else 600)
        assert machine.check_clock().found.endswith("(no timedatectl here)")
        programs(timedatectl=said)
        assert machine.check_clock().level == level

    @pytest.mark.parametrize(
        ("script", "level", "said"),
        [
            ("echo 2 12.8", "ok", "sees 2 GPUs (CUDA 12.8)"),
            ("echo 0 12.8", "failed", "sees 0 of 2 GPUs"),
            ("echo 0 None", "failed", "without CUDA"),
            ("exit 1", "failed", "cannot be imported"),
        ],
    )
    def test_what_torch_sees(
        self,
        programs: Programs,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        script: str,
        level: str,
        said: str,
    ) -> None:
        programs(python=script)
        monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
        (found,) = local.torch_sees(2)
        assert found.level == level and said in found.found


class TestDirectory:
    def test_nothing_stays(self, tmp_path: Path) -> None:
        (found,) = directory.check(tmp_path / "not" / "there")
        assert found.level in ("ok", "warning") and str(tmp_path) in found.found
        assert list(tmp_path.iterdir()) == []

    def test_not_writable(self) -> None:
        (found,) = directory.check(Path("/proc/self"))
        assert found.level == "failed" and "--directory" in found.advice

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(number: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("os.fsync", full)
        (found,) = directory.check(tmp_path)
        assert found.found == f"{tmp_path}: No space left on device" and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("free", "speed", "level"), [(1e12, 1e9, "ok"), (1e9, 1e9, "warning"), (1e12, 1e6, "warning")]
    )
    def test_room_and_speed(self, free: float, speed: float, level: str) -> None:
        assert directory.judge(PLACE, free, speed).level == level

    def test_a_file_system_whose_clock_is_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = directory.time.time
        monkeypatch.setattr(directory.time, "time", lambda: real() + 100)
        found = directory.check(tmp_path)[1]
        assert found.check == "clock" and found.level == "warning"

    def test_files_that_are_not_whole(self, tmp_path: Path) -> None:
        directory.write(tmp_path / "file", "word", size=1)
        assert directory.is_whole(tmp_path / "file", "word")
        (tmp_path / "short").write_text("rd")
        assert not directory.is_whole(tmp_path / "short", "word") and not directory.is_whole(
            tmp_path / "file", "wort"
        )
