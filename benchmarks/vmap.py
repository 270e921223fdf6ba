"""A model of one example, mapped by `vmap_stateful`, takes at most 1.02 of the time of the model of a whole batch."""

from collections.abc import Iterator

import optax

import flaxsplit as fs

from ._measure import AGAIN, HAND, OURS, Effort, Row, Tell, timed
from ._models import Stepper, batch_of, copy, dense_norm, ours, ours_vmapped, start


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """The batched model twice, for the noise floor, and the mapped one; big enough that the device's work counts."""
    tx = optax.sgd(1e-2)
    for width in effort.of(smoke=[16], quick=[256], full=[64, 256, 1024]):
        batch = batch_of(256, width)
        batched, single = dense_norm(layers=4, width=width), dense_norm(layers=4, width=width, axis_name="batch")
        carry = start(batched, tx, batch[0])
        contenders = {
            HAND: Stepper(fs.jit_step(ours(batched, tx)), copy(carry), batch, 5),
            AGAIN: Stepper(fs.jit_step(ours(batched, tx)), copy(carry), batch, 5),
            OURS: Stepper(fs.jit_step(ours_vmapped(single, tx)), copy(carry), batch, 5),
        }
        yield timed(f"width {width}, batch 256", contenders, effort, tell, per=5, bounds={OURS: 1.02}, x=width)
