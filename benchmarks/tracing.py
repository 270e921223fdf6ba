"""Tracing a step takes at most 1.10 of the time of tracing the step written by hand; lowering and compiling the same.

Dense and BatchNorm, 2 to 200 layers; each repetition traces a new function, so that nothing is found in a cache.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import optax

from ._measure import AGAIN, HAND, OURS, Effort, Row, Tell, in_turn
from ._models import DenseNorm, batch_of, by_hand, ours, start

MAKERS = {HAND: by_hand, AGAIN: by_hand, OURS: ours}
STAGES = ("trace", "lower", "compile")


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Trace, lower and compile apart, one after another."""
    tx, batch = optax.adam(1e-3), batch_of(width=16)
    for depth in effort.of(smoke=[2], quick=[2, 8, 32], full=[2, 8, 32, 100, 200]):
        model = DenseNorm(layers=depth, width=16)
        carry = start(model, tx, batch[0])
        seconds: dict[str, dict[str, list[float]]] = {stage: {name: [] for name in MAKERS} for stage in STAGES}
        for name in [*MAKERS]:
            _build(name, model, tx, carry, batch)
        tell(f"{depth} layers")
        for name in in_turn(MAKERS, effort, lambda words: None):
            for stage, taken in zip(STAGES, _build(name, model, tx, carry, batch), strict=True):
                seconds[stage][name].append(taken)
        for stage, samples in seconds.items():
            bounds = {OURS: 1.10} if stage == "trace" else {}
            yield Row(f"{stage}, {depth} layers", "s", samples, bounds=bounds, x=depth)


def _build(name: str, model: Any, tx: Any, carry: Any, batch: Any) -> list[float]:
    jitted = jax.jit(MAKERS[name](model, tx), donate_argnums=0)
    times = [time.perf_counter()]
    traced = jitted.trace(carry, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]
