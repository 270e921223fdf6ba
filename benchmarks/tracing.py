"""Tracing a step takes at most 1.10 of the time of tracing the step written by hand; lowering and compiling the same.

Dense and BatchNorm, 2 to 200 layers; each repetition traces a new function, so that nothing is found in a cache.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ._measure import OURS, SAME, Effort, Row, Tell, in_turn
from ._models import batch_of
from ._nets import mlp
from ._peers import Task, build

STAGES: dict[str, Callable[[Any, Any], Any]] = {  # each from what the one before gave
    "trace": lambda jitted, given: jitted.trace(*given),
    "lower": lambda traced, given: traced.lower(),
    "compile": lambda lowered, given: lowered.compile(),
}
WARM, FEW, MANY = 3, 10, 10_000


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Trace, lower and compile apart, one after another; a trace is quick, so it is taken many times more, alone."""
    batch = batch_of(width=16)
    for depth in effort.of(smoke=[2], quick=[2, 16], full=[2, 8, 32, 100, 200]):
        if not effort.wants(f"{depth} layers"):
            continue
        task = Task(mlp(depth, 16), (16,))
        given = {name: (build(kind, task).fresh(), batch) for name, kind in SAME.items()}
        patient = replace(effort, seconds=effort.seconds * max(1, depth / 40))
        seconds: dict[str, dict[str, list[float]]] = {stage: {name: [] for name in SAME} for stage in STAGES}
        for stages, rounds in (([*STAGES], FEW), (["trace"], MANY)):
            tell(f"{depth} layers, {' and '.join(stages)}")
            for name in in_turn(SAME, patient, lambda words: None, rounds):
                done: Any = build(SAME[name], task).step
                for stage in stages:
                    began = time.perf_counter()
                    done = STAGES[stage](done, given[name])
                    seconds[stage][name].append(time.perf_counter() - began)
        for samples in seconds["trace"].values():
            del samples[:WARM]
        for stage, found in seconds.items():
            bounds = {OURS: 1.10} if stage == "trace" else {}
            yield Row(f"{stage}, {depth} layers", "s", found, bounds=bounds, x=depth)
