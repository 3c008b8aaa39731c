"""Sizes in words."""


def size_text(size_bytes: int) -> str:
    """Bytes in the largest unit of 1,000 that leaves at least one: ``1.2 GB``."""
    value, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return (
        f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 9.95 else f"{value:.1f} {units[0]}"
    )
