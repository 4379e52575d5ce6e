"""Who may connect to a port, and what others can read of a secret."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from launcher.launch.slurm.allocation import Assignment, begin_attempt
from launcher.runs import doors, secret
from launcher.runs.layout import RunDirectory


def waiting() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def comes_in(port: int, source: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5, source_address=(source, 0)):
            return True
    except TimeoutError:
        return False


def test_a_shut_port_lets_nobody_in_and_keeps_who_is_there() -> None:
    with waiting() as server, socket.create_connection(server.getsockname(), timeout=5) as before:
        accepted, _ = server.accept()
        assert doors.admit(server.fileno())
        assert not comes_in(server.getsockname()[1])
        with accepted:
            before.sendall(b"still here")
            assert accepted.recv(64) == b"still here"


def test_a_port_takes_some_addresses_alone() -> None:
    with waiting() as server:
        port = server.getsockname()[1]
        assert doors.admit(server.fileno(), ["127.0.0.2", "127.0.0.3"])
        assert comes_in(port, "127.0.0.3") and comes_in(port, "127.0.0.2")
        assert not comes_in(port, "127.0.0.4") and not comes_in(port)


def test_what_waits_is_found_and_nothing_is_left_open_by_looking() -> None:
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    with waiting() as server, socket.socket(), open("/dev/null", "rb"):
        assert doors.Listening(server.fileno(), server.getsockname()) in doors.listening()
    # Fewer there may be: what earlier tests left may be collected meanwhile.
    assert {path.name for path in Path("/proc/self/fd").iterdir()} <= before


def test_who_came_is_known_by_address_and_user() -> None:
    with waiting() as server, socket.create_connection(server.getsockname(), source_address=("127.0.0.5", 0)):
        place = server.getsockname()
        assert doors.callers(place) == doors.callers(("0.0.0.0", place[1])) == {"127.0.0.5"}
        assert doors.callers(("127.0.0.6", place[1])) == set(), "another's port of the same number"
        assert doors.strangers({place}) == set(), "this user is none"


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("0100007F:0050", "127.0.0.1"),
        ("0000000000000000FFFF00000100007F:0050", "127.0.0.1"),
        ("00000000000000000000000001000000:0050", "::1"),
    ],
)
@pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64"),
    reason="proc(5) writes addresses in the machine's own order",
)
def test_addresses_are_read_as_the_kernel_writes_them(written: str, address: str) -> None:
    assert doors._place(written) == (address, 80)


def test_an_attempts_secret_is_its_owners_alone_and_another_each_time(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        numbers = [
            begin_attempt(RunDirectory(tmp_path), Assignment("1", 0, ("n1",), "", 0, 0, 0.0))
            for _ in range(2)
        ]
    finally:
        os.umask(before)
    paths = [tmp_path / "attempts" / f"{number:04d}" / secret.NAME for number in numbers]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600, 0o600]
    assert len({secret.read(path) for path in paths}) == 2
    paths[0].write_text("short")
    with pytest.raises(ValueError, match="no secret"):
        secret.read(paths[0])
