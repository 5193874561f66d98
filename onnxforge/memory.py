"""How much memory this process has used."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_memory"]


def peak_memory() -> int | None:
    """Most memory this process had resident so far, in bytes; None where nobody tells."""
    status = Path("/proc/self/status")  # unlike getrusage, it forgets the parent at exec
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(peak.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak_size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_size if sys.platform == "darwin" else peak_size * 1024
