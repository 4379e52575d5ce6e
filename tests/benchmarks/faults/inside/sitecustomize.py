"""Breaks a rank from inside, at a moment of its work, where this folder is on PYTHONPATH and each rank is a
new process (LAUNCHER_WARM=0).

INSIDE is ACTION@MOMENT:WHERE:NTH. WHERE is a rank, a node's name or `all`; NTH the call, counted from 1, of
which the moment is made. It acts in the first attempt, and from the NTH call on for `slow`, `nan`, `infinite`
and `spike`, in that call alone for the others. The time at which it acts is written to the file that
INSIDE_SAID names.
"""

import importlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

MOMENTS = {
    "preparing": "launcher.training.inputs:TrainingInputs.prepare",
    "loading": "launcher.training.trainer:engines.build",
    "restoring": "launcher.training.state_keeper:StateKeeper.restore",
    "evaluating": "launcher.training.held_out:evaluate",
    "data": "launcher.training.data.batches:Batches.step",
    "step": "launcher.training.trainer:Trainer._step",
    "forward": "launcher.training.engines.ENGINE.micro_step",
    "backward": "torch:Tensor.backward",
    "exchange": "launcher.training.trainer:Trainer._add_up",
    "norm": "launcher.training.engines.ENGINE.squared_gradient_norm",
    "optimizer": "launcher.training.reporting.divergence:Divergence.judge",
    "staging": "launcher.training.checkpoint.checkpointer:Checkpointer._staged",
    "writing": "launcher.training.checkpoint.checkpointer:write_hashed",
    "committing": "launcher.training.checkpoint.checkpointer:retention.commit",
}
LASTING = {"slow": 10**9, "nan": 1, "infinite": 1, "spike": 10**9}


def _say():
    with open(os.environ["INSIDE_SAID"], "a") as file:
        file.write(f"{time.time()}\n")


def _act(action, argument):
    _say()
    if action in ("kill", "stop", "crash"):
        os.kill(
            os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "crash": signal.SIGSEGV}[action]
        )
    elif action == "hang":
        threading.Event().wait()
    elif action == "memory":
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 9e15 bytes."
        )
    elif action == "ecc":
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    elif action == "leave":
        os._exit(int(argument or 21))


def _around(function, action, argument, nth):
    """The function with the fault before it, or in what it gives."""
    calls = [0]

    def wrapped(*arguments, **options):
        calls[0] += 1
        now = nth <= calls[0] < nth + LASTING.get(action, 1)
        if now and action in LASTING and calls[0] == nth:
            _say()
        if now and action == "slow":
            time.sleep(float(argument))
        elif now and action not in LASTING:
            if function.__name__ == "write_hashed":
                return function(arguments[0], _cut(arguments[1], action, argument))
            _act(action, argument)
        given = function(*arguments, **options)
        return _spoiled(given, action, argument) if now and action in LASTING else given

    wrapped.__name__ = function.__name__
    return wrapped


def _cut(blocks, action, argument):
    """Half of the first block of a file, and then the fault."""
    first = next(iter(blocks))
    yield first[: len(first) // 2]
    _act(action, argument)
    yield first[len(first) // 2 :]
    yield from blocks


def _spoiled(given, action, argument):
    if action == "infinite":
        return given * float("inf")
    if action in ("nan", "spike"):
        import dataclasses

        factor = float("nan") if action == "nan" else float(argument or 50)
        if dataclasses.is_dataclass(given):
            return dataclasses.replace(given, loss_sum=given.loss_sum * factor)
        return given._replace(loss_sum=given.loss_sum * factor)
    return given


def _target(path):
    """(holder, name) of the function that a moment means."""
    module, _, names = path.partition(":")
    if "ENGINE" in path:
        plan = json.loads(
            (Path(os.environ["LAUNCHER_ATTEMPT_DIRECTORY"]).parents[1] / "plan.json").read_text()
        )
        engine = {"fsdp": "FsdpEngine", "deepspeed": "DeepSpeedEngine"}[plan["engine"]]
        module = importlib.import_module(f"launcher.training.engines.{plan['engine']}")
        return getattr(module, engine), path.rpartition(".")[2]
    holder = importlib.import_module(module)
    *parents, last = names.split(".")
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, last


def _install(action, argument, moment, nth):
    """As soon as what is to be broken is imported."""
    while moment != "preparing" and not hasattr(sys.modules.get("launcher.training.trainer"), "Trainer"):
        time.sleep(0.005)
    holder, name = _target(MOMENTS[moment])
    plain = holder.__dict__.get(name, None) if isinstance(holder, type) else getattr(holder, name)
    made = _around(getattr(holder, name), action, argument, nth)
    setattr(holder, name, staticmethod(made) if isinstance(plain, (staticmethod, classmethod)) else made)


def _right_after(module, install):
    """Install when a module has been imported, before whoever imports it goes on."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name != module:
                return None
            sys.meta_path.remove(Finder)
            spec = importlib.util.find_spec(module)
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda imported: (run(imported), install())
            return spec

    sys.meta_path.insert(0, Finder)


_first = os.environ.get("LAUNCHER_ATTEMPT_DIRECTORY", "").endswith(os.environ.get("INSIDE_ATTEMPT", "0001"))
if (
    _first
    and "INSIDE" in os.environ
    and "RANK" in os.environ
    and "launcher.training.entry" in " ".join(sys.orig_argv)
):
    _what, _where, _nth = os.environ["INSIDE"].split(":")
    _action, _, _moment = _what.partition("@")
    _action, _, _argument = _action.partition("=")
    if _where in (os.environ["RANK"], os.uname().nodename, "all"):
        _arguments = (_action, _argument, _moment, int(_nth))
        if _moment == "preparing":  # data are prepared at once
            _right_after("launcher.training.inputs", lambda: _install(*_arguments))
        else:
            threading.Thread(target=_install, args=_arguments, daemon=True).start()
