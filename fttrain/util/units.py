"""Sizes, rates and times as people read them. GiB for memory, GB/s (1e9) for links."""

KIB, MIB, GIB = 1024, 1024**2, 1024**3


def gib(size_bytes: float) -> str:
    """``size_bytes`` as GiB with two decimals."""
    return f"{size_bytes / GIB:.2f} GiB"


def duration(seconds: float) -> str:
    """``seconds`` as ``8 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
