"""The imports of every benchmark rank, done once for all of them."""

import contextlib
import warnings

from launcher.training import engines  # noqa: F401

with (
    contextlib.suppress(Exception),
    warnings.catch_warnings(),
):  # a rank that needs it reports the failure itself
    warnings.simplefilter("ignore")
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  DeepSpeed imports a compiler through it at startup
