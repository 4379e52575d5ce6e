"""Decide whether layers are compiled, if the job leaves it open."""

from __future__ import annotations

from launcher.job.schema import EngineName
from launcher.planner.decider import Decider
from launcher.planner.model.model_support import Way

FAMILIES = (
    *("gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3"),
    *("qwen2", "qwen3", "smollm3"),
)
"""Families whose layers a test compiles, with a GPU's attention over packed samples, into one graph each."""


def is_compiled(decider: Decider, engine: EngineName, way: Way, device: str) -> bool:
    """Return whether layers are compiled: as the job says, else if each is known to be one graph."""
    model = decider.job.model
    if model.compile != "auto":
        return model.compile
    kind = (decider.config or {}).get("model_type")
    against = {
        "on a CPU it was not measured to be faster": device == "cpu",
        "compiled layers are for parallel.engine: fsdp": engine != "fsdp",
        "layers with adapters are not compiled": model.adapter is not None,
        "only layers over packed samples were tried": way.attention != "packed",
        f"of {kind or 'this model'} it is not known; tried are {', '.join(FAMILIES)}": kind not in FAMILIES,
    }
    reason = next((reason for reason, holds in against.items() if holds), None)
    if reason is not None:
        return decider.decide("model.compile", False, reason)
    return decider.decide(
        "model.compile",
        True,
        f"a layer of {kind} is one graph without breaks; what a GPU gains by it was not measured here",
    )
