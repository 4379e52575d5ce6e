"""Have a node's supervisor judge the struck alone, where this folder and the repository are on PYTHONPATH."""

import os
import sys
from pathlib import Path

if "HANGING_RUN" in os.environ and "submitit" in " ".join(sys.orig_argv):
    from tests.distributed.judging import judge_the_struck_alone

    judge_the_struck_alone(Path(os.environ["HANGING_RUN"]))
