"""Value types that many keys share (times, intervals, words), and the base class of sections."""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|min|h|d)\s*$")


class Section(BaseModel):
    """The base class of all sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)


class Interval(Section):
    """Something that happens every so many steps, or every so many seconds."""

    value: float = Field(gt=0, le=1e12)
    unit: Literal["steps", "seconds", "epochs"]

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


def parse_seconds(text: object) -> object:
    """Return `90`, `30s`, `15min`, `8h` or `2d` as seconds; anything else unchanged, for pydantic to refuse."""
    if isinstance(text, str) and (match := _DURATION.match(text)):
        return float(match[1]) * _UNITS[match[2]]
    return text


def parse_hang_after(value: object) -> object:
    """Return a time as seconds, or `auto` or `off` as it is; YAML reads a bare `off` as false. Raises
    ValueError for anything else."""
    value = "off" if value is False else parse_seconds(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value not in ("auto", "off") and not (number and float(value) >= 1):  # type: ignore[arg-type]
        raise ValueError("write auto, off, or a time of at least 1 s (90, 90s, 5min)")
    return value


def check_day(text: str) -> str:
    """Return a date written as `2026-11-28` unchanged. Raises ValueError for anything else."""
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
            return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        pass
    raise ValueError("write a day of the calendar as YEAR-MONTH-DAY, as 2026-11-28")


def parse_interval(value: object) -> object:
    """Read an interval: a whole number is steps, `15min` is a time, `epoch` and `2 epochs` are epochs."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return value
    if isinstance(value, int):
        return {"value": value, "unit": "steps"}
    if match := re.match(r"^\s*(\d+)?\s*(steps?|epochs?)\s*$", value):
        return {"value": int(match[1] or 1), "unit": match[2].rstrip("s") + "s"}
    seconds = parse_seconds(value)
    if isinstance(seconds, float):
        return {"value": seconds, "unit": "seconds"}
    raise ValueError("write a number of steps (200), a time (30s, 15min, 2h) or epochs (epoch, 2 epochs)")


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, le=1e10)]
HangAfter = Annotated[float | Literal["auto", "off"], BeforeValidator(parse_hang_after)]
Every = Annotated[Interval, BeforeValidator(parse_interval)]
Columns = str | tuple[str, ...]
Tools = str | tuple[dict[str, Any], ...]
Day = Annotated[str, AfterValidator(check_day)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]*$")]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
NodeCount = (
    Annotated[int, Field(ge=1, le=99_999)]
    | Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}-[1-9][0-9]{0,4}$")]
)
