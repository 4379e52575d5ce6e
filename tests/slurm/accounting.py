"""Slurm's accounting for a test cluster: MariaDB and slurmdbd, with one account."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.slurm.configuration import Settings, slurmdbd_conf
from tests.slurm.machines import Daemon, Machine, poll

ACCOUNT = "research"
# The database is read at its start; a user and his rights need no second connection that way.
_FIRST_STATEMENTS = """CREATE DATABASE slurm;
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1';
"""


def missing() -> str | None:
    return next(
        (
            f"{name} is not installed"
            for name in ("slurmdbd", "mariadbd", "mariadb-install-db")
            if shutil.which(name) is None
        ),
        None,
    )


def start_database(settings: Settings, head: Machine) -> list[Daemon]:
    """MariaDB and slurmdbd, in the order in which they have to start."""
    directory = settings.directory
    subprocess.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={directory}/database",
            "--user=root",
            "--skip-test-db",
        ],
        capture_output=True,
        check=True,
    )
    statements = directory / "database.sql"
    statements.write_text(_FIRST_STATEMENTS)
    socket = directory / "database.socket"
    options = [
        f"--datadir={directory}/database",
        f"--socket={socket}",
        f"--pid-file={directory}/database.pid",
        f"--init-file={statements}",
    ]
    # Its files live as long as a test: no write has to reach the disk.
    options += [
        "--user=root",
        "--bind-address=127.0.0.1",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-flush-method=nosync",
    ]
    database = head.daemon("mariadbd", "--no-defaults", *options, log=directory / "database.log")
    _wait_for(socket.exists, database, "MariaDB")
    configuration = directory / "slurmdbd.conf"
    configuration.write_text(slurmdbd_conf(settings))
    configuration.chmod(0o600)
    server = head.daemon(
        "env", f"SLURM_CONF={settings.slurm_conf}", "slurmdbd", "-D", log=directory / "slurmdbd.out"
    )
    _wait_for(lambda: "slurmdbd version" in _text(directory / "slurmdbd.log"), server, "slurmdbd")
    return [database, server]


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _wait_for(question: Callable[[], object], daemon: Daemon, what: str) -> None:
    def answer() -> object:
        daemon.check()
        return question()

    poll(answer, 30, f"start of {what}")


def add_account(run: Callable[..., str]) -> None:
    """The cluster, which is not known before its controller or this tells of it, one account, and root in it."""

    def is_heard() -> bool:
        # slurmdbd says that it has started before it listens.
        with contextlib.suppress(RuntimeError):
            run("sacctmgr", "-i", "add", "cluster", "test")
            return True
        return False

    poll(is_heard, 30, "slurmdbd heard of the cluster")
    run("sacctmgr", "-i", "add", "account", ACCOUNT, "cluster=test")
    run("sacctmgr", "-i", "add", "user", "root", f"account={ACCOUNT}", "cluster=test")
