"""The energy of calls on the CPU, where the system lets it be read: Linux's powercap, most often by root alone."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
# Counters are written each millisecond, and short calls repeated for so long.
LEAST_S = 0.2


def joules(call: Callable[[], Any]) -> float | None:
    """Return the energy of a call, that of all that the CPU's packages do meanwhile; None where it cannot be read."""
    before = _read()
    if not before:
        return None
    begin, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - begin < LEAST_S:
        call()
        calls += 1
    after = _read()
    # Counters begin anew past their largest value.
    return sum((after[zone][0] - value) % (most + 1) for zone, (value, most) in before.items()) / 1e6 / calls


def _read() -> dict[str, tuple[int, int]]:
    """Return of each package, not of its parts, the microjoules counted and the largest count."""
    found = {}
    for zone in sorted(POWERCAP.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:
            try:
                if not (zone / "name").read_text().startswith("package"):
                    continue  # the platform, which holds them
                value, most = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
            except OSError:  # not ours to read
                continue
            found[zone.name] = value, most
    return found
