"""A full disk that is no mock: the system itself refuses files above a size."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

resource = pytest.importorskip("resource", reason="file size limits are Unix's")


def limit_files(size: int) -> None:
    """From now on the system lets no file of this process grow above so many bytes; -1 for no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """As `limit_files`, for as long as the block lasts."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the refusal kills
    limit_files(size)
    try:
        yield
    finally:
        limit_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        signal.signal(signal.SIGXFSZ, handler)
