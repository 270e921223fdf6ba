"""Tracing a step takes at most 1.10 of the time of tracing the step written by hand; lowering and compiling the same.

Dense and BatchNorm, 2 to 200 layers; each repetition traces a new function, so that nothing is found in a cache.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from ._measure import OURS, SAME, Effort, Row, Tell, in_turn
from ._models import batch_of
from ._nets import mlp
from ._peers import Task, build

STAGES = ("trace", "lower", "compile")


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Trace, lower and compile apart, one after another."""
    batch = batch_of(width=16)
    for depth in effort.of(smoke=[2], quick=[2, 8, 32], full=[2, 8, 32, 100, 200]):
        task = Task(mlp(depth, 16), (16,))
        carries = {name: build(kind, task).fresh() for name, kind in SAME.items()}
        seconds: dict[str, dict[str, list[float]]] = {stage: {name: [] for name in SAME} for stage in STAGES}
        for name, kind in SAME.items():
            _build(kind, task, carries[name], batch)
        tell(f"{depth} layers")
        for name in in_turn(SAME, effort, lambda words: None):
            for stage, taken in zip(STAGES, _build(SAME[name], task, carries[name], batch), strict=True):
                seconds[stage][name].append(taken)
        for stage, samples in seconds.items():
            bounds = {OURS: 1.10} if stage == "trace" else {}
            yield Row(f"{stage}, {depth} layers", "s", samples, bounds=bounds, x=depth)


def _build(kind: str, task: Task, carry: Any, batch: Any) -> list[float]:
    jitted = build(kind, task).step
    times = [time.perf_counter()]
    traced = jitted.trace(carry, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]
