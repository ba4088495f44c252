"""Numbers, times and sizes in words."""

from __future__ import annotations


def number(value: float) -> str:
    """A number with as many digits as a reader needs."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time in words."""
    for factor, unit in ((1e-3, "s"), (1.0, "ms")):
        if seconds * 1e3 * factor >= 1:
            return f"{seconds * 1e3 * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(count: float) -> str:
    """A number of bytes in words."""
    value, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if value >= 100 or units[0] == "bytes" else f"{value:.3g} {units[0]}"
