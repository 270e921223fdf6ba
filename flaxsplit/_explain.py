"""Look at a step before it runs: what will compile again, what is lost, what is wasted."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from ._checks import checked
from ._compiled import collectives, cost_of, instructions, memory_of
from ._find_leaves import Found, in_leaves
from ._find_state import in_state
from ._find_work import in_work
from ._look import Look, look_at
from ._refusals.explain import KINDS
from ._report import Finding, StepReport, order
from ._tally import products


@checked
def explain_step(
    step: Callable[..., tuple[Any, Any]], carry: Any, batch: Any, *args: Any, **kwargs: Any
) -> StepReport:
    """Looks at a training step before it runs, and says what will go wrong or waste, each with its fix.

    Law: nothing is run and nothing is donated; `explain_step(step, carry, batch).memory` is what
    `jax.jit(step, donate_argnums=0).lower(carry, batch).compile().memory_analysis()` says.

    >>> import jax, jax.numpy as jnp, flaxsplit as fs
    >>> def step(carry, batch):
    ...     return {"mean": batch.mean(0, keepdims=True)}, batch.sum()
    >>> report = fs.explain_step(step, {"mean": jnp.zeros(5, "float32")}, jnp.ones((8, 5), "float32"))
    >>> report.findings[0].kind, report.findings[0].leaves
    ('shape', ("carry['mean']: f32[5] -> f32[1,5]",))

    Args:
        step: any function `(carry, batch, ...) -> (carry, out)`: of flaxsplit, by hand, over a `TrainState`, of Equinox
            or NNX's functional API. What is jitted is looked at as it was jitted, another as `jit_step` would do it.
        carry: what it threads: arrays, numbers, or `jax.ShapeDtypeStruct`. Places and buffers are known of arrays only.
        batch: what it consumes.
        *args: what else it takes.
        **kwargs: and by name.

    Returns:
        A `StepReport`: `print(report)` is a page, `report.findings` are values, what costs most first.

    Raises:
        SignatureError: the step is no function or does not return two things, the carry is no tree of arrays.

    As `jax.jit(step).lower(...).compile()`, but it reads for you what that knows.
    """
    look = look_at(step, carry, batch, args, kwargs)
    finders = (in_leaves, in_state, in_work)
    findings = sorted((_told(look, each) for find in finders for each in find(look)), key=order)
    platform = {device.platform for leaf in look.inputs if leaf.place for device in leaf.place.device_set}
    return StepReport(
        look.name,
        tuple(findings),
        look.devices,
        ", ".join(sorted(platform)) or "device",
        dict(zip(("trace", "compile"), look.seconds, strict=True)),
        _leaves(look),
        dict(instructions(look.text)),
        cost_of(look.compiled),
        memory_of(look.compiled),
        {name: each._asdict() for name, each in collectives(look.text).items()},
        _products(look),
    )


def _told(look: Look, fault: Found) -> Finding:
    kind = KINDS[fault.kind]
    where = fault.lines[0].partition(": ")[0]
    fix = kind.ours if look.ours else kind.fix
    return Finding(fault.kind, kind.group, where, kind.what, fault.lines, kind.cause, fix, fault.cost, fault.unit)


def _leaves(look: Look) -> dict[str, int]:
    carry, batch, new = len(look.part("carry")), len(look.part("batch")), len(look.new_leaves)
    host = sum(isinstance(leaf.given, np.ndarray) for leaf in look.inputs)
    others, out = len(look.inputs) - carry - batch, len(look.outputs) - new
    return {"carry": carry, "batch": batch, "others": others, "carry out": new, "out": out, "host": host}


def _products(look: Look) -> dict[str, int]:
    flops: Counter[str] = Counter()
    for each in products(look.jaxpr):
        flops[each.dtype] += each.flops
    return dict(flops)
