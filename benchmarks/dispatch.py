"""A step is dispatched in at most 1.02 of the time of the step written by hand, jitted and donated over the same carry.

The executables are the same (tests/test_hlo.py), so what could differ is the host's part. Trees of 10 to 10,000 leaves,
and the 8-layer MLP of 119 leaves, there beside every peer.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flaxsplit as fs

from . import _nets as nets
from ._measure import AGAIN, HAND, OURS, SAME, Effort, Row, Tell, timed
from ._models import Stepper, batch_of, copy
from ._peers import PEERS, USUAL, Task, build, check_agree, losses_of, missing, present, stepper

STEPS = 20


def contenders(hand: Any, mine: Any, carry: fs.Carry, batch: Any, count: int) -> dict[str, Stepper]:
    """The hand-written step twice, for the noise floor, and ours."""
    return {
        HAND: Stepper(jax.jit(hand, donate_argnums=0), copy(carry), batch, count),
        AGAIN: Stepper(jax.jit(lambda carry, batch: hand(carry, batch), donate_argnums=0), copy(carry), batch, count),
        OURS: Stepper(fs.jit_step(mine), copy(carry), batch, count),
    }


def many_leaves(leaves: int) -> tuple[Any, Any, fs.Carry, Any]:
    """A step over so many params that next to nothing is computed for each."""
    tx = optax.sgd(0.1)
    params = {f"layer_{i}": {"kernel": jnp.ones(2), "bias": jnp.zeros(2)} for i in range(leaves // 2)}

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        first = params["layer_0"]
        return jnp.sum(first["kernel"] * batch + first["bias"]), state

    def hand(carry: Any, batch: Any) -> Any:
        count, params, state, opt_state = carry
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return fs.Carry(count + 1, params, state, opt_state), loss

    return hand, fs.with_optimizer(loss_fn, tx), fs.init_carry(params, {}, tx), jnp.ones(2)


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """By hand twice and ours, twenty steps at a time; fewer where a step takes long."""
    batch, task = batch_of(width=16), Task(nets.mlp(8, 16), (16,))
    if effort.wants("MLP, 8 layers"):
        mlp = {name: stepper(build(kind, task), batch, STEPS) for name, kind in SAME.items()}
        yield timed("MLP, 8 layers", mlp, effort, tell, per=STEPS, bounds={OURS: 1.02})
    if effort.wants("MLP, every peer"):
        yield every_peer(effort, tell, task, batch)
    for leaves in effort.of(smoke=[10], quick=[10, 100, 1000], full=[10, 30, 100, 300, 1000, 3000, 10_000]):
        if not effort.wants(f"{leaves} leaves"):
            continue
        hand, mine, carry, given = many_leaves(leaves)
        steps = max(1, min(STEPS, 2000 // leaves))
        yield timed(
            f"{leaves} leaves",
            contenders(hand, mine, carry, given, steps),
            effort,
            tell,
            per=steps,
            bounds={OURS: 1.02},
            x=leaves,
        )


def every_peer(effort: Effort, tell: Tell, task: Task, batch: Any) -> Row:
    """The MLP by everyone, fewer steps at a time: some take long."""
    names = present(effort.of(smoke=[OURS, HAND], quick=USUAL, full=PEERS))
    peers = {name: build(name, task) for name in names}
    check_agree({name: losses_of(peer.step, peer.fresh(), batch, 3) for name, peer in peers.items()})
    few = STEPS // 4
    loops = {name: stepper(peer, batch, few) for name, peer in peers.items()}
    notes = missing() if effort.name != "smoke" else {}
    return timed("MLP, every peer", loops, effort, tell, per=few, bounds={OURS: 1.02}, notes=notes)
