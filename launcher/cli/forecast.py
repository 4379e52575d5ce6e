"""Forecasts as bars on a terminal, as tables and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.runs.wording import duration, gib, several

if TYPE_CHECKING:
    from launcher.planner.forecast import Forecast
    from launcher.planner.suggestions import Suggestion

_LENGTH, _SHORTEST = 48, 20
"""Characters of the longest bar: at most, and the fewest with text after it."""
_SIGNS = "█▓▒░▞▚▙▟▛▜▄"
_COLOURS = (
    "#4e79a7",
    "#59a14f",
    "#e15759",
    "#f28e2b",
    "#edc948",
    "#b07aa1",
    "#76b7b2",
    "#ff9da7",
    "#9c755f",
    "#bab0ac",
    "#d3d3d3",
)


def bars(forecast: Forecast, width: int | None = None) -> str:
    """Return stacked bars of memory by phase, with a legend; `width` is in characters."""
    phases, highest, memory = (
        forecast.footprint.phases,
        forecast.footprint.highest,
        forecast.target.memory_bytes,
    )
    signs = {kind: _SIGNS[number % len(_SIGNS)] for number, kind in enumerate(_kinds(forecast))}
    longest = _longest(forecast)
    enlarged = f" (the longest bar is {gib(highest.total)})" if longest < memory else ""
    lines = ["", f"Memory of a rank, by phase{enlarged}:"]
    hosts = [f", {gib(phase.host)} of the host's" if phase.host else "" for phase in phases]
    beside = 2 + max(12, *(len(phase.name) for phase in phases)) + 1 + 1 + 10  # with a comma
    room = _LENGTH if width is None else width - beside
    if room - max(map(len, hosts)) >= _SHORTEST:  # otherwise the text after a bar goes to the next line
        room -= max(map(len, hosts)) if width is not None else 0
    length = max(1, min(_LENGTH, room))
    for phase, host in zip(phases, hosts, strict=True):
        bar, part = "", 0.0
        for kind, sign in signs.items():
            part += phase.parts.get(kind, 0)
            bar += sign * (round(length * part / longest) - len(bar))
        lines.append(f"  {phase.name:12} {bar:{length}} {gib(phase.total):>9}{host}")
    shown = {kind: size for kind in signs if (size := highest.parts.get(kind))}
    lines.append("  " + "  ".join(f"{signs[kind]} {kind} {gib(size)}" for kind, size in shown.items()))
    if memory:
        lines.append(f"  {'fits' if forecast.fits else 'does NOT fit'}: {forecast.line()}")
    if forecast.plan.mesh.device == "cpu":
        lines.append(
            "  a run's `peak` is more: Python and its libraries, and freed memory that a process keeps"
        )
    return "\n".join(lines)


def _longest(forecast: Forecast) -> float:
    """Return the bytes of a full bar: the device's memory, unless all bars would be tiny compared with it."""
    highest, memory = forecast.footprint.highest.total, forecast.target.memory_bytes
    return max(highest, memory) if highest > memory / 4 else highest


def _kinds(forecast: Forecast) -> list[str]:
    return list(dict.fromkeys(kind for phase in forecast.footprint.phases for kind in phase.parts))


def beside_trace(traced: Forecast, formulas: Forecast | None) -> str:
    """Return a line on the source of a forecast that is traced from the model's own class, with the
    formulas' figure."""
    if formulas is None or formulas.traced:
        return "  by a profile of the model's own class"
    ours, theirs = traced.footprint.phase("steady step").peak, formulas.footprint.phase("steady step").peak
    difference = f"{gib(theirs)}, {theirs / ours - 1:+.1%}"
    return f"  traced from the model's own class; of a steady step the formulas say {difference}"


def speed_lines(forecast: Forecast, no_epoch: str | None = None) -> str:
    """Return the step time and rates, if they are known. no_epoch: why the time of an epoch is unknown."""
    speed, items = forecast.speed, forecast.items
    if speed is None:
        return ""
    on_cpu = forecast.plan.mesh.device == "cpu"
    heading = "Speed, were every sample as long as it may be:"
    if forecast.padded is not None and items is not None:
        padding = f", padded to {forecast.padded:.0f}" if forecast.padded > items.mean else ""
        heading = f"Speed, of samples of {items.mean:.0f} tokens{padding}:"
    lines = ["", heading]
    if items:
        lines.append(f"  an epoch     {items.words()}")
        if (plan := forecast.plan).data.streaming:
            epochs = plan.length.value * plan.batch.global_batch_size / items.num_items
            steps = f"{int(plan.length.value):,} steps, which the job says and not the data"
            lines.append(f"  streamed     {steps}: about {epochs:.2g} epochs")
    elif no_epoch:
        lines.append(f"  an epoch     is not known: {no_epoch}")
    messages = f"{_seconds(speed.communication)} of messages ({_seconds(speed.exposed)} of them waited for)"
    parts = f"{_seconds(speed.compute)} computing, {messages}, {_seconds(speed.optimizer)} optimizer"
    share = f"{speed.utilisation:.0%} of the " + (
        "processors' measured rate" if on_cpu else "GPUs' peak (MFU)"
    )
    lines.append(f"  a step       {_seconds(speed.step)}: {parts}")
    lines.append(f"  rate         {speed.tokens_per_second:,.0f} tokens/s, {share}")
    if (rates := forecast.target.gpu) and "--quick" in rates.source:
        lines.append(f"  measured     by {rates.source}; launcher bench takes longer and scatters less")
    if whole := forecast.duration:
        waiting = f"{whole.data * whole.num_steps:.1f} s for data"
        if whole.num_saves:
            saves = f"{several(whole.num_saves, 'checkpoint')} of {gib(forecast.checkpoint_bytes)}"
            waiting += f", {whole.saving:.1f} s for {saves}"
        if whole.num_evaluations:
            waiting += f", {whole.evaluating:.1f} s for {several(whole.num_evaluations, 'evaluation')}"
        hours = (
            f"{whole.total / 3600 * forecast.plan.mesh.world_size:,.1f} {'rank' if on_cpu else 'GPU'}-hours"
        )
        lines.append(
            f"  waiting      {waiting}: {1 - whole.num_steps * whole.step / whole.total:.1%} of the time"
        )
        lines.append(f"  to the end   {duration(whole.total)}, {hours}, for {whole.num_steps:,} steps")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def nearest(suggestions: Sequence[Suggestion]) -> str:
    """Return the nearest plans that fit, with the memory of each."""
    if not suggestions:
        ways = "take a smaller model, other GPUs, or DeepSpeed with memory.offload_to on NVMe"
        return f"\nNothing near it fits: {ways}."
    lines = [f"  {suggestion.text}: {suggestion.forecast.line()}" for suggestion in suggestions]
    return "\n".join(["", "The nearest plans that fit:", *lines])


def picture(forecast: Forecast) -> str:
    """Return the bars as an SVG with its own background."""
    from xml.sax.saxutils import escape

    phases, memory, kinds = forecast.footprint.phases, forecast.target.memory_bytes, _kinds(forecast)
    longest, highest = _longest(forecast), forecast.footprint.highest
    colours = {kind: _COLOURS[number % len(_COLOURS)] for number, kind in enumerate(kinds)}
    bottom = 26 * len(phases) + 70
    height = bottom + 20 * len(kinds) + 30
    rates = forecast.target.gpu
    device = rates.key if rates else forecast.plan.mesh.device
    title = f"{forecast.plan.name}: memory of a rank on {device}, by phase"
    rows = [
        '<rect width="760" height="100%" fill="white"/>',
        f'<text x="20" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for number, phase in enumerate(phases):
        left, top = 120.0, 60 + 26 * number
        rows.append(f'<text x="110" y="{top + 14}" text-anchor="end">{phase.name}</text>')
        for kind, colour in colours.items():
            width = 500 * phase.parts.get(kind, 0) / longest
            rectangle = f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="18" fill="{colour}">'
            rows.append(f"{rectangle}<title>{kind}</title></rect>")
            left += width
        rows.append(f'<text x="{left + 6:.1f}" y="{top + 14}">{gib(phase.total)}</text>')
    if memory and memory <= longest:
        x = 120 + 500 * memory / longest
        ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="50" y2="{bottom - 8}"'
        rows.append(f'<line {ends} stroke="black" stroke-dasharray="4"/>')
        rows.append(f'<text x="{x:.1f}" y="44" text-anchor="middle">{gib(memory)}, all there is</text>')
    elif memory:
        rows.append(f'<text x="120" y="48">enlarged: it has {gib(memory)}</text>')
    for number, (kind, colour) in enumerate(colours.items()):
        y = bottom + 20 * number
        rows.append(f'<rect x="120" y="{y}" width="12" height="12" fill="{colour}"/>')
        part = gib(highest.parts.get(kind, 0))
        rows.append(f'<text x="138" y="{y + 11}">{kind}: {part} ({highest.name})</text>')
    style = 'font-family="sans-serif" font-size="13"'
    body = "\n".join(rows)
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}" {style}>\n{body}\n</svg>\n'
