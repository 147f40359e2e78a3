"""What else the machine did during a measurement: CPU time of other processes, from /proc/stat. Linux only; elsewhere empty."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

QUIET = 0.1  # cores that others may use on a machine that counts as quiet


@dataclass(frozen=True)
class Times:
    """Seconds since some moment: of the clock, of all processors (busy, stolen by the host), of this process."""

    wall: float
    busy: float
    stolen: float
    own: float


def times() -> Times | None:
    """This moment; None where the system has no /proc/stat."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, stolen = (int(word) / os.sysconf("SC_CLK_TCK") for word in words)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return Times(time.monotonic(), user + nice + system + irq + softirq, stolen, own)


class OtherLoad:
    """Cores that others have used since the object was made.

    Child processes count as this one's own once they have been waited for.
    """

    def __init__(self) -> None:
        self._start = times()

    def cores(self) -> float | None:
        """Mean number of cores that other processes used; None if unknown."""
        return self.as_dict().get("other_cores")

    def as_dict(self) -> dict[str, float]:
        """other_cores, stolen_cores (the host ran other machines), seconds, load_average of one minute."""
        now, start = times(), self._start
        if now is None or start is None:
            return {}
        wall = max(now.wall - start.wall, 1e-9)
        other = max(0.0, now.busy - start.busy - (now.own - start.own)) / wall
        return {
            "other_cores": round(other, 3), "stolen_cores": round((now.stolen - start.stolen) / wall, 3),
            "seconds": round(wall, 2), "load_average": round(os.getloadavg()[0], 2),
        }


def sentence(load: dict[str, float]) -> str:
    """The load in words."""
    if not load:
        return "load of other processes: unknown on this system"
    quiet = "quiet" if load["other_cores"] + load["stolen_cores"] <= QUIET else "NOT QUIET"
    return (
        f"{quiet}: other processes used {load['other_cores']:.2f} cores, the host took {load['stolen_cores']:.2f}, "
        f"over {load['seconds']:.0f} s"
    )


def wait_until_quiet(seconds: float, probe: float = 0.25) -> bool:
    """Wait up to `seconds` for a moment in which others use no core; whether there was one."""
    end = time.monotonic() + seconds
    while True:
        load = OtherLoad()
        time.sleep(probe)
        cores = load.cores()
        if cores is None or cores <= QUIET:
            return True
        if time.monotonic() >= end:
            return False
