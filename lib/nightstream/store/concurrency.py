"""Writes to different tables that run at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


def start(tasks: list[Callable[[], None]]) -> list[Future[None]]:
    """Run all, side by side."""
    if not tasks:
        return []
    pool = ThreadPoolExecutor(len(tasks))
    futures = [pool.submit(task) for task in tasks]
    pool.shutdown(wait=False)
    return futures


def finish(running: list[Future[None]]) -> None:
    """Wait for all, then raise the first error."""
    wait(running)
    for future in running:
        future.result()
