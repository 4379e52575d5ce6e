"""The rank that causes a hang, and the reason. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from launcher.runs.places import PLACES
from launcher.runs.seen import Seen, SeenAgent
from launcher.runs.wording import duration

_SETTLED_SECONDS = 1.0
_STOPPED_SECONDS = 5.0
"""The time after which a stopped agent may be what its ranks wait for; before that it is not."""
_MOST_NAMED = 4
_LOADER = "data"


def name(
    ranks: list[Seen],
    seconds: float,
    step_seconds: float,
    unheard: Iterable[str] = (),
    agents: Iterable[SeenAgent] = (),
    is_of_agent: bool = False,
) -> tuple[str, Seen]:
    """Return the line that people see, and the rank that the others wait for.

    `unheard` are hosts whose supervisors have fallen silent, `agents` the stopped agents. If the hang
    `is_of_agent`, the ranks make progress or do not exist yet, and the first agent is returned as rank -1. At
    least one of `ranks` and `agents` must not be empty.
    """
    stopped = list(agents)
    cannot_start = any(agent.stopped_seconds >= _STOPPED_SECONDS for agent in stopped if not agent.has_ranks)
    if is_of_agent or (cannot_start and not any(seen.state == "T" for seen in ranks)):
        return _of_agents(stopped, ranks)
    culprits = _culprits(ranks, set(unheard))
    others = [seen for seen in ranks if seen not in culprits]
    parts = [_group(culprits, lambda seen: _what(seen, set(unheard), everyone=not others), hosts=True)]
    if others:
        parts.append(_group(others, _waits, hosts=False))
    parts += map(_agent, stopped)
    return f"{_head(culprits[0], ranks, seconds, step_seconds)}: {'; '.join(parts)}", culprits[0]


def _of_agents(agents: list[SeenAgent], ranks: list[Seen]) -> tuple[str, Seen]:
    """Return the line and the culprit for stopped agents. An agent blocks only the ranks that it has not
    started yet."""
    first, *others = sorted(agents, key=lambda agent: (agent.has_ranks, -agent.stopped_seconds))
    guilty = Seen(-1, first.host, first.pid, "starting", step=max((seen.step for seen in ranks), default=0))
    then = ["the ranks go on, and one that ends is not noticed there"]
    if not first.has_ranks:
        then = ["its ranks cannot start", *([_group(ranks, _waits, hosts=False)] if ranks else [])]
    head = f"{_agent(first)} for {duration(first.stopped_seconds)}"
    return "; ".join([head, *map(_agent, others), *then]), guilty


def _agent(agent: SeenAgent) -> str:
    return f"the agent on {agent.host} is stopped (SIGSTOP)"


def stalled_save(seen: Seen) -> str:
    """Return the line that names a save which has made no progress for long."""
    kernel = f", blocked in the kernel{f' ({seen.wchan})' if seen.wchan else ''}" if seen.state == "D" else ""
    what = f"rank {seen.rank} on {seen.host} is {seen.save} {seen.save_detail}".rstrip()
    still = f"the save of step {seen.save_step} has not moved for {duration(seen.save_still_seconds)}"
    return f"{still}: {what}{kernel}; training goes on"


def _head(culprit: Seen, ranks: list[Seen], seconds: float, step_seconds: float) -> str:
    first = min(ranks, key=lambda seen: seen.rank)
    still = f"for {duration(seconds)}"
    if culprit.place == "evaluating" or first.place == "evaluating":
        at = culprit if culprit.place == "evaluating" else first
        return f"no batch of the evaluation {still} after {at.done} of {at.total}"
    if culprit.phase in ("step", "storage") or culprit.place in (
        "data",
        "forward",
        "backward",
        "exchange",
        "optimizer",
    ):
        rounded = f"{step_seconds:.1f}" if step_seconds >= 0.1 else f"{step_seconds:.2g}"
        takes = f" (a step takes {rounded} s)" if step_seconds else ""
        return f"no step {still} after step {max(seen.step for seen in ranks)}{takes}"
    return f"nothing has moved {still} in {culprit.place if culprit.count else 'the script'}"


def _culprits(ranks: list[Seen], unheard: set[str]) -> list[Seen]:
    """Return the stopped ranks; else those with a stopped child process; else those on silent hosts; else those
    blocked in the kernel; else those outside a collective that others wait in; else the least advanced."""
    waiting = [seen for seen in ranks if _is_waiting(seen)]
    candidates = (
        [seen for seen in ranks if seen.state == "T" and not seen.traced],
        [seen for seen in ranks if seen.child],
        [seen for seen in ranks if seen.host in unheard],
        [
            seen
            for seen in ranks
            if seen.state == "D" and seen.state_seconds >= _SETTLED_SECONDS and not _is_waiting(seen)
        ],
        [seen for seen in ranks if seen not in waiting] if waiting else [],
    )
    least = min(map(_progress, ranks))
    return next(filter(None, candidates), [seen for seen in ranks if _progress(seen) == least])


def _is_waiting(seen: Seen) -> bool:
    if seen.phase == "wait":
        return True
    return seen.collective or bool(seen.waits_in)


def _progress(seen: Seen) -> tuple[int, int, int]:
    return seen.step, seen.done, PLACES.index(seen.place)


def _group(ranks: list[Seen], words: Callable[[Seen], str], hosts: bool) -> str:
    """Return one phrase for each group of ranks in the same state, with their `hosts` if wanted."""
    by_state: dict[str, list[Seen]] = {}
    for seen in ranks:
        by_state.setdefault(words(seen), []).append(seen)
    return "; ".join(
        f"{_names(some, hosts)} {text if len(some) == 1 else _plural(text)}"
        for text, some in by_state.items()
    )


def _names(ranks: list[Seen], with_hosts: bool) -> str:
    hosts = list(dict.fromkeys(seen.host for seen in ranks))
    where = f" on {hosts[0] if len(hosts) == 1 else f'{len(hosts)} nodes'}" if with_hosts else ""
    if len(ranks) == 1:
        return f"rank {ranks[0].rank}{where}"
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"ranks {', '.join(str(seen.rank) for seen in ranks[:_MOST_NAMED])}{more}{where}"


def _plural(text: str) -> str:
    for one, many in (("is ", "are "), ("waits ", "wait "), ("has ", "have ")):
        if text.startswith(one):
            return many + text.removeprefix(one)
    return text


def _what(seen: Seen, unheard: set[str], everyone: bool) -> str:
    """Return the description of a rank that the others wait for."""
    if seen.state == "T":
        return "is stopped (SIGSTOP)"
    if seen.child:
        return f"waits for {seen.child}, which is stopped (SIGSTOP)"
    if seen.host in unheard:
        return "has not been heard of: its node does not answer"
    if seen.state == "D":
        where = ", ".join(
            filter(
                None,
                (
                    seen.detail or seen.place,
                    f"blocked in the kernel, {seen.wchan}" if seen.wchan else "blocked in the kernel",
                ),
            )
        )
        return f"is in the file system ({where})"
    if seen.place == _LOADER:
        return (
            f"is in the loader ({', '.join(filter(None, (seen.detail, seen.frame)))})"
            if seen.detail or seen.frame
            else "is in the loader"
        )
    if _is_waiting(seen) and not everyone:
        return f"is the one that came least far: {_where(seen)}, in {seen.waits_in or 'a collective'}"
    if _is_waiting(seen):
        return _waits(seen) + f" ({_where(seen)})"
    return f"is in {_where(seen)}" + (f", at {seen.frame}" if seen.frame else "")


def _where(seen: Seen) -> str:
    """Return a rank's place and its progress there; a script reports neither."""
    if not seen.count:
        return "the script"
    unit = {
        "forward": "micro-batch",
        "backward": "micro-batch",
        "data": "micro-batch",
        "evaluating": "batch",
    }.get(seen.place, "")
    number = seen.done + (1 if unit == "micro-batch" else 0)
    far = (
        f", {unit} {min(number, seen.total)} of {seen.total}"
        if unit and seen.total
        else f", {seen.done} of {seen.total}"
        if seen.total
        else ""
    )
    detail = f", {seen.detail}" if seen.detail else ""
    return f"{seen.place}{far}{detail}"


def _waits(seen: Seen) -> str:
    if seen.phase == "wait":
        return "waits for the preparation"
    if seen.waits_in:
        return f"waits in {seen.waits_in}"
    if _is_waiting(seen):
        return "waits in all_reduce" if seen.place == "exchange" else "waits in a collective"
    return f"is in {_where(seen)}"
