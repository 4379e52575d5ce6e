"""Read the mapping in a YAML file, unchecked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.job import paths
from launcher.job.yaml_text import MOST_BYTES, parse
from launcher.plain_files import read_text


def read(path: Path) -> dict[str, Any]:
    """Return the mapping in a job file, unchecked. Raises ConfigurationError where there is none."""
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise ConfigurationError(
            Problem("JOB", str(path), f"no such file{paths.nearest_file(path)}")
        ) from None
    except IsADirectoryError:
        raise ConfigurationError(Problem("JOB", str(path), "a directory; name the job file in it")) from None
    except UnicodeDecodeError:
        raise ConfigurationError(Problem("JOB", str(path), "not UTF-8 text; a job file is YAML")) from None
    except OSError as error:
        raise ConfigurationError(Problem("JOB", str(path), f"cannot be read: {error.strerror}")) from None
    content = parse(text, str(path))
    if not isinstance(content, dict):
        raise ConfigurationError(
            "a job file is a mapping of keys; this is "
            f"{'empty' if content is None else 'a ' + type(content).__name__}",
            str(path),
        )
    return content
