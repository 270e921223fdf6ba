"""A model of one example, mapped by `vmap_stateful`, takes at most 1.02 of the time of the model of a whole batch.

In narrow layers it can take more, and so does `jax.vmap` by hand: with an `axis_name`, Flax's BatchNorm averages mean
and mean square as one array, which XLA puts together and takes apart again in each layer. The fusions show it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax

import flaxsplit as fs

from . import _nets as nets
from ._measure import AGAIN, HAND, OURS, Effort, Row, Tell, timed
from ._models import Stepper, batch_of, copy, dense_norm, ours, start

VMAPPED = "jax.vmap by hand"


def by_hand(model: nets.Linen) -> Any:
    """The `apply` of a model written for one example, mapped as Flax's guide does it."""

    def apply(variables: Any, x: Any, mutable: Any) -> Any:
        def single(x: Any) -> Any:
            return model.apply(variables, x, mutable=mutable)

        return jax.vmap(single, out_axes=(0, None), axis_name="batch")(x)

    return apply


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """The batched model twice, for the noise floor, and the mapped one, by hand too; and what XLA made of each."""
    tx = optax.sgd(1e-2)
    for width in effort.of(smoke=[16], quick=[256], full=[64, 256, 1024]):
        if not effort.wants(f"width {width}"):
            continue
        batch = batch_of(256, width)
        batched, single = dense_norm(layers=4, width=width), dense_norm(layers=4, width=width, axis_name="batch")
        carry = start(batched, tx, batch[0])
        steps = {
            HAND: fs.jit_step(ours(batched, tx)),
            AGAIN: fs.jit_step(ours(batched, tx)),
            VMAPPED: fs.jit_step(ours(by_hand(single), tx)),
            OURS: fs.jit_step(ours(single, tx, mapped=True)),
        }
        contenders = {name: Stepper(step, copy(carry), batch, 5) for name, step in steps.items()}
        yield timed(f"width {width}, batch 256", contenders, effort, tell, per=5, bounds={OURS: 1.02}, x=width)
        fusions = {name: [float(_fusions(step, carry, batch))] for name, step in steps.items()}
        yield Row(f"fusions, width {width}", "fusions", fusions, x=width)


def _fusions(step: Any, carry: fs.Carry, batch: Any) -> int:
    text: str = step.lower(carry, batch).compile().as_text()
    return text.count(" fusion(")
