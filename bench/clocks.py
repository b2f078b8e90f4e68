"""The clock of a GPU while something was measured: the rate of a product depends on it, and it on the last 100 ms.

bench/gpu.sh has nvidia-smi write a line every 200 ms into a file that the variable CLOCKS names; here the lines of a
span of time are read back. Without the variable, or before the first line, a clock is unknown: None.
"""

import datetime
import os
import statistics
from pathlib import Path

_FORMAT = "%Y/%m/%d %H:%M:%S.%f"  # of nvidia-smi, in local time


def now() -> datetime.datetime:
    return datetime.datetime.now()


def median_mhz(begin: datetime.datetime, end: datetime.datetime | None = None) -> float | None:
    """The median SM clock from `begin` to `end` (now if left out)."""
    path = os.environ.get("CLOCKS")
    if not path or not Path(path).exists():
        return None
    last = end or now()
    values = [mhz for time, mhz in map(_sample, Path(path).read_text().splitlines()) if time and begin <= time <= last]
    return statistics.median(values) if values else None


def beside(mhz: float | None) -> str:
    """For the end of a printed line."""
    return "" if mhz is None else f", SM clock {mhz:.0f} MHz (median)"


def _sample(line: str) -> tuple[datetime.datetime | None, float]:
    """Time and clock of a line of the file; None for the header and for a line that is not whole yet."""
    fields = line.split(",")
    try:
        return datetime.datetime.strptime(fields[0].strip(), _FORMAT), float(fields[1].split()[0])
    except (ValueError, IndexError):
        return None, 0.0
