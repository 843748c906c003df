"""Timing in turns, so that what else a machine does falls on all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable


def in_turns(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each, round by round; in another order each time, since who follows another on the same memory or
    follows itself finds it in the caches."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            began = clock()
            runs[name]()
            seconds[name].append(clock() - began)
    return seconds
