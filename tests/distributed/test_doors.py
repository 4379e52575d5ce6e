"""Another user of the machine gets into no run: whatever a run's processes listen on, and meet by, is shut to
others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters

from launcher.errors import RankLostError
from launcher.launch.rendezvous import _Rendezvous
from launcher.runs import doors, secret
from launcher.runs.events import steps
from tests.distributed.test_local import HERE, begun, finish, launched, make_run, pids, wait_for
from tests.distributed.test_script import log, run_script
from tests.ports import free_port

pytestmark = pytest.mark.slow

_WAITING = """
import encodings.idna, os, socket, sys
os.setgid(65534)
os.setuid(65534)
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.sendall(int(sys.argv[2]).to_bytes(8, "little"))
print("connected", flush=True)
sys.stdin.read()
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def attack(
    ports: list[int], files: list[str], names: list[str], flag: Path, enter: list[str] | None = None
) -> dict[str, Any]:
    """What the user nobody reaches."""
    addresses = {address.address.partition("%")[0] for of in psutil.net_if_addrs().values() for address in of}
    addresses = {address for address in addresses if "." in address or address.count(":") != 5}
    asked = {
        "ports": ports,
        "addresses": sorted(addresses),
        "files": files,
        "names": names,
        "flag": str(flag),
    }
    command = [*(enter or []), sys.executable, str(HERE / "stranger.py"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    assert said["uid"] == 65534
    return said


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    one = psutil.Process(pid)
    return [one, *one.children(recursive=True)]


def ports(processes: list[psutil.Process]) -> dict[int, str]:
    """The ports on which they listen, each with its address; of those that have not ended meanwhile."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [
                one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN
            ]
    return {address.port: address.ip for address in found}


def stores_of(processes: list[psutil.Process]) -> list[str]:
    """The stores that they have open, as paths through which they can be opened again."""
    found = []
    for process in processes:
        for path in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found += [str(path)] if "launcher-store" in str(path.readlink()) else []
    return found


def test_more_machines_than_nodes_end_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger was there as the agents met: he is among those who would be let in again."""
    monkeypatch.setenv("LAUNCHER_ATTEMPT_DIRECTORY", str(tmp_path))
    for name in ("LAUNCHER_SECRET_FILE", "LAUNCHER_STORE"):
        monkeypatch.delenv(name, raising=False)
    meeting = _Rendezvous(RendezvousParameters("launcher", f"127.0.0.1:{free_port()}", "none", 1, 1), 0)
    store, address, port = meeting._on_several()
    store.set("name", "value")
    assert (
        TCPStore(address, port, is_master=False).list_keys()[0].startswith(secret.read(tmp_path / "secret"))
    )
    with (
        pytest.raises(OSError),
        socket.create_connection((address, port), timeout=0.5, source_address=("127.0.0.9", 0)),
    ):
        pass
    monkeypatch.setattr(doors, "callers", lambda place: {"10.0.0.1", "10.0.0.2"})
    with pytest.raises(
        RankLostError, match=r"2 machines came to meet for a run on 1 nodes: 10\.0\.0\.1, 10\.0\.0\.2"
    ):
        _Rendezvous(
            RendezvousParameters("launcher", f"127.0.0.1:{free_port()}", "none", 1, 1), 0
        )._on_several()


@needs_root
def test_another_user_gets_into_no_run_of_this_machine(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    flag = tmp_path / "flag"
    run = make_run(tmp_path, {"gloo": True, "step_seconds": 0.1}, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "two steps")
        processes = family(process.pid)
        ranks = [one for one in processes if one.pid in pids(run)]
        others = [one for one in processes if one not in ranks]
        listening = ports(ranks)
        stores = stores_of(others)
        assert ports(others) == {}, "neither launcher nor agent listens"
        assert set(listening.values()) == {"127.0.0.1"} and stores
        assert not any(run.run_id() in argument for one in processes for argument in one.cmdline())
        done = len(steps(run.metrics_file))
        said = attack(
            list(listening), stores, [f"torch.rendezvous.{run.run_id()}-1", "torch.rendezvous.none"], flag
        )
        assert said["reached"] == [] and said["opened"] == []
        wait_for(lambda: len(steps(run.metrics_file)) > done + 2, "more steps")
        process.send_signal(signal.SIGTERM)
        code, errors = finish(process)
    assert code == 75, errors
    assert not flag.exists()


@needs_root
def test_who_takes_a_ranks_place_while_it_waits_is_found_out(tmp_path: Path) -> None:
    """The other rank comes late; meanwhile a stranger connects to the port on which the first waits for it."""
    run = make_run(tmp_path, {"gloo": True, "late": 1}, num_steps=5)
    with launched(run) as process:
        wait_for(
            lambda: ports([one for one in family(process.pid) if one.pid in pids(run)]), "a rank listens"
        )
        (port,) = ports([one for one in family(process.pid) if one.pid in pids(run)])
        stranger = subprocess.Popen(
            [sys.executable, "-c", _WAITING, str(port), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert stranger.stdout is not None and stranger.stdout.readline() == b"connected\n"
        (run.path / "go").touch()
        code, errors = finish(process)
        stranger.communicate()
    assert code == 9
    assert "another user of this machine (uid 65534) connected" in errors


def test_a_script_meets_as_the_trainer_does(tmp_path: Path) -> None:
    """By the environment, as Accelerate and the Trainer do; objects between its own ranks are its own
    business."""
    code, said = run_script(tmp_path / "run", HERE / "scripts" / "doors.py")
    assert code == 0, said
    for rank in range(2):
        lines = [line for line in log(tmp_path / "run", rank).splitlines() if line.startswith("met by")]
        assert lines == ["met by FileStore ports 1 open 0 sum 2.0"] * 2
