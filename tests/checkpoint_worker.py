"""Trains with dropout, BatchNorm, Adam and an average, saving every step: python -m tests.checkpoint_worker FOLDER HOW.

Starts at the newest checkpoint in FOLDER, if there is one. HOW is "like", restored with the carry as target, or "bare",
restored without. Ends by writing every leaf to FOLDER/end.npz. The parent (test_checkpoint) may kill it anywhere.
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

import flaxsplit as fs

from .models import Dropping, X

STEPS = 40
_apply = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(Dropping())))


def loss_fn(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    """A mean square over a model with every kind of state."""
    out, state = _apply(params, state, batch, train=True)
    return ((out - 1) ** 2).mean(), state


def start(tx: optax.GradientTransformation) -> fs.Carry:
    """The carry of step 0."""
    params, state = fs.split_params(Dropping().init(jax.random.key(0), X[0], train=False))
    return fs.init_carry(params, state | fs.rng_state(dropout=jax.random.key(1)) | {"ema": params}, tx)


def main(folder: pathlib.Path, how: str) -> None:
    """Trains to the last step."""
    tx = optax.adam(1e-2)
    step = fs.jit_step(fs.assert_max_traces(fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.9)))
    carry = start(tx)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder / "steps", options=options) as manager, fs.compile_log() as log:
        if manager.latest_step() is not None:
            target = ocp.args.StandardRestore(carry if how == "like" else None)
            carry = fs.adopt_carry(manager.restore(manager.latest_step(), args=target), carry)
        print("from", int(carry.step), flush=True)
        for i in range(int(carry.step), STEPS):
            carry, _ = step(carry, X * (1 + i % 5))
            manager.save(i + 1, args=ocp.args.StandardSave(carry))
            print("step", i + 1, flush=True)
        manager.wait_until_finished()
    print("compiles", log.compiles["loss_fn"], "traces", log.traces["loss_fn"], flush=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(carry)
    is_key: Any = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    numpy: dict[str, Any] = {
        jax.tree_util.keystr(path): np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        for path, leaf in leaves
    }
    np.savez(folder / "end.npz", **numpy)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
