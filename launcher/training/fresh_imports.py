"""The imports of every measuring rank, done once for all of them."""

import contextlib
import warnings

from launcher.training import engines  # noqa: F401

with (
    contextlib.suppress(Exception),
    warnings.catch_warnings(),
):  # a rank that needs it says what is wrong with it
    warnings.simplefilter("ignore")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  by which DeepSpeed imports a compiler when it starts
