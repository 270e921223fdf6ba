"""`skip_nonfinite` around a step takes at most 1.02 of the time of the same guard written by hand.

Beside them the step without a guard, and with `optax.apply_if_finite`, which guards params and optimizer but not the
statistics. Instructions and FLOPs are XLA's own count, so they are exact.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flaxsplit as fs

from ._measure import AGAIN, HAND, OURS, Effort, Row, Tell, timed
from ._models import Stepper, batch_of, copy, dense_norm, ours, start

BARE, NAIVE, OPTAX = "no guard", "by hand, no barrier", "optax.apply_if_finite"


def guarded(step: Any, barrier: bool = True) -> Any:
    """The guard by hand: all that is floating, old or new by one flag; worked out once, as an expert has XLA do it."""

    def guarding(carry: Any, batch: Any) -> Any:
        new, loss = step(carry, batch)
        floats = [leaf for leaf in jax.tree.leaves((new, loss)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        taken = jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]).all()
        taken = jax.lax.optimization_barrier(taken) if barrier else taken
        return jax.tree.map(lambda after, before: jnp.where(taken, after, before), new, carry), loss

    return guarding


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """By the width of the layers: the wider, the less a guard costs beside what it guards."""
    for width in effort.of(smoke=[16], quick=[64], full=[16, 64, 256, 1024]):
        if not effort.wants(f"width {width}"):
            continue
        model, batch = dense_norm(width=width), batch_of(256, width)
        tx, finite = optax.adam(1e-3), optax.apply_if_finite(optax.adam(1e-3), 1_000_000)
        carry = start(model, tx, batch[0])
        step = ours(model, tx)
        guards = {HAND: guarded(step), AGAIN: guarded(step), OURS: fs.skip_nonfinite(step)}
        guards |= {NAIVE: guarded(step, barrier=False), BARE: step}
        jitted = {name: fs.jit_step(each) for name, each in guards.items()} | {OPTAX: fs.jit_step(ours(model, finite))}
        carries = dict.fromkeys(jitted, carry) | {OPTAX: start(model, finite, batch[0])}
        tell(f"width {width}: what is compiled")
        compiled = {name: each.lower(carries[name], batch).compile() for name, each in jitted.items() if name != AGAIN}
        counts = {name: [float(instructions(each))] for name, each in compiled.items()}
        yield Row(f"instructions, width {width}", "instructions", counts)
        contenders = {name: Stepper(each, copy(carries[name]), batch) for name, each in jitted.items()}
        yield timed(f"time of a step, width {width}", contenders, effort, tell, bounds={OURS: 1.02}, x=width)


def instructions(compiled: Any) -> int:
    """Lines of the optimized HLO that compute something."""
    return sum(" = " in line for line in compiled.as_text().splitlines())
