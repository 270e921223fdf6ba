"""A step of a real network takes at most 1.02 of the time of the step by hand; beside it, every peer at its best.

Examples per second, with the share of what this device was measured to do at most: in one product of matrices (FLOP)
and in one copy (bytes), in the same run. FLOPs and bytes of a step are XLA's, bytes before anything stays in a cache.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _nets as nets
from ._measure import AGAIN, HAND, OURS, Effort, Row, Run, Tell, in_turn, memory_of, seconds, timed
from ._peers import (
    BEST,
    EQUINOX,
    HAIKU,
    NNX,
    TRAIN_STATE,
    Peer,
    Task,
    build,
    check_agree,
    losses_of,
    missing,
    present,
    refusal,
    stepper,
)

BESTS = (OURS, HAND, TRAIN_STATE + BEST, NNX + BEST, EQUINOX + BEST, HAIKU + BEST)
QUICK = (OURS, HAND, NNX + BEST, EQUINOX + BEST, HAIKU + BEST)
CLASSES = 1000


def batch_of(task: Task, size: int) -> Any:
    """Noise, and classes to tell it apart by."""
    chance = np.random.default_rng(0)
    x = jnp.asarray(chance.normal(size=(size, *task.shape)), task.compute or jnp.float32)
    return x, jnp.asarray(chance.integers(CLASSES, size=size))


def task_of(name: str, side: int, compute: Any) -> Task:
    """One of the networks, `side` pixels or places long."""
    made: dict[str, tuple[nets.Layers, tuple[int, ...]]] = {
        "MLP": ((*nets.mlp(8, 512)[:-1], nets.Dense(CLASSES)), (512,)),
        "ResNet-18": (nets.resnet(18), (side, side, 3)),
        "ResNet-50": (nets.resnet(50), (side, side, 3)),
        "ResNet-50's stand-in": (nets.resnet(18, width=4), (side, side, 3)),
        "transformer, small": (nets.transformer(2, 128, 4), (side, 128)),
        "transformer": (nets.transformer(12, 768, 12), (side, 768)),
    }
    layers, shape = made[name]
    return Task(layers, shape, compute=compute, make_tx=lambda: optax.sgd(1e-3, momentum=0.9))


BF16 = jnp.bfloat16
Sizes = dict[str, list[tuple[str, int, Any, int | None]]]
CPU: Sizes = {
    "smoke": [("MLP", 0, None, 8)],
    "quick": [("MLP", 0, None, 256), ("transformer, small", 32, None, 16)],
    "lease": [  # stand-ins: the same plan, small enough for two cores
        ("ResNet-50's stand-in", 32, BF16, None),
        ("transformer, small", 16, BF16, 8),
        ("MLP", 0, None, 64),
    ],
    "full": [
        *(("MLP", 0, dtype, size) for dtype in (None, BF16) for size in (64, 1024)),
        *(("ResNet-18", 32, dtype, 32) for dtype in (None, BF16)),
        ("ResNet-50", 64, None, 16),
        *(("transformer, small", 64, dtype, 16) for dtype in (None, BF16)),
    ],
}
ACCELERATOR: Sizes = {
    "smoke": CPU["smoke"],
    "quick": [("MLP", 0, None, 1024), ("ResNet-18", 224, BF16, 64), ("transformer, small", 128, BF16, 64)],
    "lease": [
        ("ResNet-50", 224, BF16, None),
        ("transformer", 512, BF16, 16),
        ("ResNet-18", 224, BF16, 256),
        ("MLP", 0, BF16, 16_384),
    ],
    "full": [
        *(("MLP", 0, dtype, size) for dtype in (None, BF16) for size in (1024, 16_384)),
        *(("ResNet-18", 224, dtype, 256) for dtype in (None, BF16)),
        ("ResNet-50", 224, None, 64),
        ("ResNet-50", 224, BF16, 64),
        ("ResNet-50", 224, BF16, None),  # as many as fit
        *(("transformer", 512, dtype, 16) for dtype in (None, BF16)),
    ],
}


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Network by network; a peer that is not there, or that refuses, is said."""
    sizes = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    names = present([*effort.of(smoke=[OURS, HAND], quick=QUICK, full=BESTS)])
    peaks: dict[Any, dict[str, float]] = {}
    absent = {name: words for name, words in missing().items() if name in BESTS and effort.name != "smoke"}
    for name, side, compute, examples in sizes[effort.name]:
        task = task_of(name, side, compute)
        case = f"{name}{f' of {side}' if side else ''}, {'bf16' if compute else 'f32'}"
        if not effort.wants(f"{case}, batch {examples or 'that fits'}"):
            continue
        tell(f"{case}: the most that this device does")
        if compute not in peaks:
            peaks[compute] = dict(peak(compute or jnp.float32, effort))
        size = examples or largest(task, tell)
        case = f"{case}, batch {size}"
        batch = batch_of(task, size)
        hand = build(HAND, task)
        cost = cost_of(hand, batch)
        contenders, notes = started(names, task, hand, batch, tell)
        yield timed(
            case,
            contenders,
            effort,
            tell,
            bounds={OURS: 1.02},
            notes=notes | absent,
            work={"examples": size, **cost, **peaks[compute]},
        )


def started(
    names: list[str], task: Task, hand: Peer, batch: Any, tell: Tell
) -> tuple[dict[str, Run], dict[str, str]]:
    """Every contender that agrees with the step by hand, the same losses seen first; and what is to say of others."""
    calm = Task(nets.without_dropout(task.layers), task.shape, compute=task.compute, make_tx=task.make_tx)
    few = jax.tree.map(lambda leaf: leaf[:4], batch)
    contenders, losses, notes = dict[str, Run](), dict[str, list[float]](), dict[str, str]()
    for name in names:
        tell(f"starting {name}")
        try:
            peer = hand if name == HAND else build(name, task)
            still = build(name, calm) if task.draws else peer
            losses[name] = losses_of(still.step, still.fresh(), few if task.draws else batch, 2)
            contenders[name] = stepper(peer, batch)
            contenders[name]()
        except Exception as error:  # whatever another library says
            if name in (OURS, HAND):
                raise
            notes[name] = refusal(error)
    if not task.compute:
        check_agree({HAND: losses[HAND], **losses}, 1e-2)
    else:  # roundings of bf16 go their own ways from the first update on
        check_agree({HAND: losses[HAND][:1], **{name: each[:1] for name, each in losses.items()}}, 5e-2)
    return contenders | {AGAIN: stepper(hand, batch)}, notes


def cost_of(hand: Peer, batch: Any) -> Mapping[str, float]:
    """FLOPs and bytes of the step by hand, by XLA's count; the calls after it take what was compiled for this."""
    found: Any = hand.step.lower(hand.fresh(), batch).compile().cost_analysis()
    found = found[0] if isinstance(found, list) else found
    return {"FLOP": float(found["flops"]), "bytes": float(found["bytes accessed"])}


def peak(dtype: Any, effort: Effort) -> Iterator[tuple[str, float]]:
    """What this device does in a second: FLOPs in a product of two matrices, bytes in a copy."""
    cpu = jax.default_backend() == "cpu"
    side, long = (2048, 2**26) if cpu else (8192, 2**29)
    side, long = (128, 2**16) if effort.name == "smoke" else (side, long)
    a, x = jnp.ones((side, side), dtype), jnp.ones(long, jnp.uint8)
    product: Any = jax.jit(lambda a: a @ a)
    copied: Any = jax.jit(lambda x: x + 1)
    for name, function, given, work in (("FLOP/s", product, a, 2.0 * side**3), ("bytes/s", copied, x, 2.0 * long)):
        run = functools.partial(function, given)
        jax.block_until_ready(run())
        samples = [seconds(run) for _ in in_turn([name], effort, lambda words: None, 20)]
        yield name, work / float(np.median(samples))


def largest(task: Task, tell: Tell) -> int:
    """The largest power of two of examples whose step fits into the memory, beside the carries of all contenders.

    XLA says what a step of few examples needs; what it needs for more grows with them. One compile is enough.
    """
    tell("how much memory does an example take?")
    peer, few = build(HAND, task), 8 if jax.default_backend() == "cpu" else 64
    carry = peer.fresh()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(carry)) * (len(BESTS) + 3)
    batch = batch_of(task, few)
    given = sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    each = (memory_of(peer.step, carry, batch).temp_size_in_bytes + 2 * given) / few
    device: Any = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 2**28)  # the CPU tells none: a stand-in
    return int(2 ** max(3, math.floor(math.log2(max(1.0, (0.85 * limit - held) / each)))))
