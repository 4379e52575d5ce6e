"""A run's use of devices, in hours and in money."""

from __future__ import annotations

from collections.abc import Mapping


def in_words(device_hours: Mapping[str, float], prices: Mapping[str, float]) -> str:
    """Return the GPU-hours, the rank-hours on CPUs, and their cost if it is known: `3.2 GPU-hours, cost 8.00`.
    If only some devices have a price, those without one are named."""
    kinds: dict[str, float] = {}
    for device, hours in device_hours.items():
        kind = "rank-hours" if device in ("", "cpu") else "GPU-hours"
        kinds[kind] = kinds.get(kind, 0.0) + hours
    parts = [f"{_short(hours)} {kind}" for kind, hours in kinds.items()]
    if (spent := cost(device_hours, prices)) is not None:
        parts.append(f"cost {spent:,.2f}" if spent >= 0.1 else f"cost {spent:.2g}")
    elif prices and (missing := sorted(filter(None, device_hours.keys() - prices.keys()))):
        parts.append(f"no price of {', '.join(missing)}")
    return ", ".join(parts)


def _short(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}"


def cost(device_hours: Mapping[str, float], prices: Mapping[str, float]) -> float | None:
    """Return the cost of these hours, from the prices per device-hour; None if a price is missing."""
    if not device_hours or device_hours.keys() - prices.keys():
        return None
    return round(sum(hours * prices[device] for device, hours in device_hours.items()), 4)
