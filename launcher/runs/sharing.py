"""Read access to the files of a run: as the umask says, or for the group too."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_GROUP_READS = stat.S_IRGRP | stat.S_IXGRP


def set_umask(share_with_group: bool) -> None:
    """With `share_with_group`, let the group read the files that this process and its children create from now
    on; else change nothing."""
    if share_with_group:
        os.umask(os.umask(0o077) & ~_GROUP_READS)


def share(path: Path) -> None:
    """Let the group read this user's existing files below a path; links are left alone."""
    for directory, _, names in os.walk(path):
        for entry in (Path(directory), *(Path(directory) / name for name in names)):
            with contextlib.suppress(OSError):
                mode = entry.lstat().st_mode
                if not stat.S_ISLNK(mode):
                    reads = _GROUP_READS if stat.S_ISDIR(mode) or mode & stat.S_IXUSR else stat.S_IRGRP
                    entry.chmod(stat.S_IMODE(mode) | reads)
