"""How torch's threads wait for work, set before torch is imported. It imports nothing but `os`."""

from __future__ import annotations

import os

SPIN_COUNT = "3000"
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_gently() -> None:
    """Lets torch's threads sleep soon after each operation, so that they leave the cores to other processes.

    torch's wheels for Linux bring libgomp. Its threads look for more work 300,000 times, some milliseconds, before they
    sleep. Where another process wants a core, they hold up each other and it (see `benchmarks/waiting.py`). libgomp
    reads the setting once, so this has an effect only before the first import of torch. A user's own setting of either
    variable stays. Other OpenMP runtimes do not read this one.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
