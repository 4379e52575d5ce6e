"""An entry point of ranks for tests: the trainer's own, on a machine that is short of memory in step 4."""

from __future__ import annotations

import os

from launcher.training import entry
from tests.training.test_rescue import short_of_memory

if __name__ == "__main__":
    short_of_memory("backward", int(os.environ["SAMPLES_THAT_FIT"]), 4, int(os.environ["RANK"]))
    entry.main()
