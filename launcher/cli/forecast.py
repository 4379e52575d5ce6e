"""Show a forecast: bars on a terminal, a table, a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.planning.memory import gib
from launcher.runs.words import duration

if TYPE_CHECKING:
    from launcher.planning.forecast import Forecast

WIDTH = 48
_SIGNS = "█▓▒░▞▚▙▟▛▜▄"
_COLOURS = ("#4e79a7", "#59a14f", "#e15759", "#f28e2b", "#edc948", "#b07aa1", "#76b7b2", "#ff9da7", "#9c755f", "#bab0ac", "#d3d3d3")


def bars(made: Forecast) -> str:
    """Stacked bars of memory by phase, with what the signs stand for."""
    kinds = _kinds(made)
    longest = max([phase.total for phase in made.footprint.phases] + [made.memory_bytes])
    lines = ["", "Memory of a rank, by phase:"]
    for phase in made.footprint.phases:
        bar = "".join(sign * round(WIDTH * phase.parts.get(kind, 0) / longest) for kind, sign in kinds.items())
        host = f", {gib(phase.host)} of the host's" if phase.host else ""
        lines.append(f"  {phase.name:12} {bar:{WIDTH}} {gib(phase.total):>9}{host}")
    highest = made.footprint.highest
    lines.append("  " + "  ".join(f"{sign} {kind} {gib(highest.parts[kind])}" for kind, sign in kinds.items() if highest.parts.get(kind)))
    if made.memory_bytes:
        lines.append(f"  {'fits' if made.fits else 'does NOT fit'}: {made.line()}")
    return "\n".join(lines)


def _kinds(made: Forecast) -> dict[str, str]:
    names = dict.fromkeys(kind for phase in made.footprint.phases for kind in phase.parts)
    return {kind: _SIGNS[number % len(_SIGNS)] for number, kind in enumerate(names)}


def compared(traced: Forecast, formulas: Forecast | None, why_not: str | None) -> str:
    """What the formulas say beside a trace, in a line, or why they say nothing."""
    if formulas is None:
        return f"  traced from the model's own class; {why_not}"
    ours, theirs = traced.footprint.phase("steady step").peak, formulas.footprint.phase("steady step").peak
    return f"  traced from the model's own class; of a steady step the formulas say {gib(theirs)}, {theirs / ours - 1:+.1%}"


def speed_lines(made: Forecast) -> str:
    """Step time and rates, where they are known."""
    from launcher.planning.epochs import why_no_items

    s = made.speed
    if s is None:
        return ""
    on_cpu = made.plan.mesh.device == "cpu"
    messages = f"{_seconds(s.communication)} of messages ({_seconds(s.exposed)} of them waited for)"
    parts = f"{_seconds(s.compute)} computing, {messages}, {_seconds(s.optimizer)} optimizer"
    learnt = f", x{s.correction:.2f} as runs here took" if s.correction != 1 else ""
    share = f"{s.utilisation:.0%} of the " + ("processors' measured rate" if on_cpu else "GPUs' peak (MFU)")
    lines = [f"  a step       {_seconds(s.step)}: {parts}{learnt}", f"  rate         {s.tokens_per_second:,.0f} tokens/s, {share}"]
    if d := made.duration:
        saves = f"{d.saving:.1f} s for {_several(d.num_saves, 'checkpoint')} of {gib(made.checkpoint_bytes)}"
        evaluations = f", {d.evaluating:.1f} s for {_several(d.num_evaluations, 'evaluation')}" if d.num_evaluations else ""
        waiting = f"{d.data * d.num_steps:.1f} s for data, {saves}{evaluations}"
        hours = f"{d.total / 3600 * made.plan.mesh.world_size:,.1f} {'rank' if on_cpu else 'GPU'}-hours"
        lines += [
            f"  waiting      {waiting}: {1 - d.num_steps * d.step / d.total:.1%}",
            f"  to the end   {duration(d.total)}, {hours}, for {d.num_steps:,} steps",
        ]
    if made.items:
        lines.insert(0, f"  an epoch     {made.items.words()}")
    elif why_not := why_no_items(made.plan):
        lines.insert(0, f"  an epoch     is not known: {why_not}")
    return "\n".join(["", _of_which_samples(made), *lines])


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _several(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number > 1)}"


def _of_which_samples(made: Forecast) -> str:
    if made.padded is None or made.items is None:
        return "Speed, were every sample as long as it may be:"
    padding = f", padded to {made.padded:.0f}" if made.padded > made.items.mean else ""
    return f"Speed, of samples of {made.items.mean:.0f} tokens{padding}:"


def advice(made: Forecast, per_node: int | None = None) -> str:
    """Where a plan does not fit: the nearest that do, and what each costs. `per_node`: GPUs that a node has, where that is known."""
    if made.fits:
        return ""
    from launcher.planning.nearest import PER_NODE, nearest_that_fit

    found = nearest_that_fit(made, per_node=PER_NODE if per_node is None else per_node)
    if not found:
        return "\nNothing near it fits: take a smaller model, other GPUs, or DeepSpeed with memory.offload_to on NVMe."
    lines = [f"  {words}: {other.line()}" for words, other in found]
    return "\n".join(["", "The nearest plans that fit:", *lines])


def picture(made: Forecast) -> str:
    """The bars as an SVG."""
    kinds = list(_kinds(made))
    longest = max([phase.total for phase in made.footprint.phases] + [made.memory_bytes])
    rows, height = [], 26 * len(made.footprint.phases) + 20 * len(kinds) + 60
    for number, phase in enumerate(made.footprint.phases):
        left, top = 120.0, 20 + 26 * number
        rows.append(f'<text x="110" y="{top + 14}" text-anchor="end">{phase.name}</text>')
        for kind in kinds:
            width = 500 * phase.parts.get(kind, 0) / longest
            colour = _COLOURS[kinds.index(kind) % len(_COLOURS)]
            rows.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="18" fill="{colour}"><title>{kind}</title></rect>')
            left += width
        rows.append(f'<text x="{left + 6:.1f}" y="{top + 14}">{gib(phase.total)}</text>')
    if made.memory_bytes:
        x = 120 + 500 * made.memory_bytes / longest
        rows.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="{26 * len(made.footprint.phases) + 20}" stroke="black" stroke-dasharray="4"/>'
        )
    for number, kind in enumerate(kinds):
        y = 26 * len(made.footprint.phases) + 40 + 20 * number
        rows.append(f'<rect x="120" y="{y}" width="12" height="12" fill="{_COLOURS[number % len(_COLOURS)]}"/>')
        rows.append(f'<text x="138" y="{y + 11}">{kind}</text>')
    style = 'font-family="sans-serif" font-size="13"'
    body = "\n".join(rows)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" {style}>\n{body}\n</svg>\n'
