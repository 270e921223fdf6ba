"""The same training step as each library's own documentation writes it, in its usual mode and in its best.

Every peer computes one function, a network of `_nets`, from the same weights; `check_agree` compares their losses and
refuses to go on where they differ. What a peer carries from step to step is `held`.
"""

import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import core, nnx, serialization
from flax.training import train_state

import flaxsplit as fs

from . import _nets as nets
from ._measure import HAND, OURS
from ._models import Stepper, loss_of
from ._nets import Layers

GUIDE, TRAIN_STATE, NNX, TREE = "the guide's loop", "TrainState", "nnx.jit", "nnx.jit, tree mode"
CACHED, PARTIAL, SUBSTRAX = "nnx.cached_partial", "nnx.jit_partial", "substrax"
EQUINOX, HAIKU = "equinox", "haiku"
BEST = ", donated"

Watch = Callable[[Any], Any]


@dataclass(frozen=True)
class Task:
    """What the step is of.

    Attributes:
        layers: the network.
        shape: of one example.
        dtype: params and state are cast to it before the first step.
        compute: what the network computes in, its params and state being float32.
        frozen: Linen's variables come as FrozenDict.
        static: the step takes `train` as a static argument.
        pinned: flaxsplit's step takes `like`.
    """

    layers: Layers
    shape: tuple[int, ...]
    dtype: Any = None
    compute: Any = None
    frozen: bool = False
    static: bool = False
    pinned: bool = False
    make_tx: Any = lambda: optax.adam(1e-3)

    @property
    def example(self) -> jax.Array:
        """A batch to initialize with."""
        return jnp.ones((2, *self.shape))

    @property
    def sown(self) -> tuple[str, ...]:
        """The collections that Linen's form of the network sows into."""
        return ("losses",) if nets.has(self.layers, nets.Sow) else ()

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return nets.has(self.layers, nets.Dropout)

    def linen(self) -> nets.Linen:
        """The network in Linen, made anew."""
        return nets.Linen(self.layers, self.compute)


@dataclass(frozen=True)
class Peer:
    """One way to write the step.

    Attributes:
        step: `(held, batch) -> (held, loss)`; takes `train=` where the task is static.
        fresh: makes what the first step takes; `module=True` and `tx=True` make the module or the optimizer anew.
        evaluate: `(held, x) -> prediction`.
        restored: takes `held` through a file, the way the library's documentation does.
        placed: makes what the first step takes on a mesh, given its replicated sharding.
        traced: the name that the compile log has for the step.
    """

    name: str
    step: Any
    fresh: Any
    evaluate: Any
    restored: Any
    placed: Any
    traced: str = "train_step"


def start_of(task: Task, sharding: Any = None) -> Any:
    """Linen's variables, buffers of their own at each call; where a sharding is given, there."""
    variables = cast_to(task.dtype, task.linen().init(key_of(), task.example, train=False))
    variables = core.freeze(variables) if task.frozen else variables
    return variables if sharding is None else jax.device_put(variables, sharding)


def cast_to(dtype: Any, tree: Any) -> Any:
    """Casts what is floating, where a dtype is given."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if is_floating(leaf) else leaf, tree) if dtype else tree


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of floats."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def key_of() -> jax.Array:
    """The key that everything is drawn from; a buffer of its own at each call."""
    return jax.random.key(2)


def through_msgpack(tree: Any) -> Any:
    """Flax's own serialization: NumPy arrays come back."""
    return serialization.from_bytes(tree, serialization.to_bytes(tree))


def made(task: Task) -> Any:
    """The task's module and optimizer, the same objects until others are asked for."""
    model, tx = task.linen(), task.make_tx()

    def make(module: bool = False, new_tx: bool = False) -> tuple[Any, Any]:
        return task.linen() if module else model, task.make_tx() if new_tx else tx

    return make


def flag(task: Task, **options: Any) -> dict[str, Any]:
    """Options for a jit, with the static argument where the task has one."""
    return {**options, "static_argnames": ("train",)} if task.static else options


def ours(task: Task, watch: Watch) -> Peer:
    """Flaxsplit, with what it offers for each situation."""
    model, tx = made(task)()
    apply: Any = fs.with_mutable(model, capture=task.sown)
    apply = fs.with_rngs(apply) if task.draws else apply
    still: Any = fs.with_mutable(model, mutable=False)

    def loss_fn(params: Any, state: Any, batch: Any) -> Any:
        pred, state = apply(params, state, batch[0])
        return loss_of(pred[0] if task.sown else pred, batch[1]), state

    def loss_still(params: Any, state: Any, batch: Any) -> Any:
        pred, state = still(params, state, batch[0], train=False)
        return loss_of(pred, batch[1]), state

    def evaluate(carry: Any, x: Any) -> Any:
        return still(carry.params, carry.state, x, train=False)[0]

    def halves() -> Any:
        params, state = fs.split_params(start_of(task))
        state = {name: tree for name, tree in state.items() if name not in task.sown}
        state |= fs.rng_state(dropout=key_of()) if task.draws else {}
        return params, fs.settle_state(apply, params, state, task.example)

    def fresh(module: bool = False, new_tx: bool = False) -> Any:
        params, state = halves()
        return fs.init_carry(params, state, task.make_tx() if new_tx else tx)

    def placed(sharding: Any) -> Any:
        params, state = jax.device_put(halves(), sharding)
        return fs.init_carry(params, state, tx)

    def jitted(loss_fn: Any, carry: Any) -> Any:
        return fs.jit_step(watch(fs.with_optimizer(loss_fn, tx)), like=carry if task.pinned else None)

    def step(carry: Any, batch: Any, train: bool = True) -> Any:
        if train not in steps:
            steps[train] = jitted(loss_fn if train else loss_still, carry)
        return steps[train](carry, batch)

    steps: dict[bool, Any] = {}
    whole = step if task.pinned or task.static else jitted(loss_fn, None)

    def restored(carry: Any) -> Any:
        return fs.adopt_carry(through_msgpack(carry), carry)

    loss_still.__name__ = loss_fn.__name__
    return Peer(OURS, whole, fresh, jax.jit(evaluate), restored, placed, "loss_fn")


def guides_loop(task: Task, watch: Watch) -> Peer:
    """The update step of Flax's guide on managing params and state, jitted; `apply_fn` comes first, so it is static."""
    make = made(task)
    tx = make()[1]

    def train_step(
        apply_fn: Any, x: Any, y: Any, key: Any, opt_state: Any, params: Any, state: Any, train: bool = True
    ) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, **state}
            pred, updated = apply_fn(variables, x, train=train, mutable=list(state.keys()), rngs={"dropout": used})
            return loss_of(pred, y), updated

        key, used = jax.random.split(key)

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return key, opt_state, optax.apply_updates(params, updates), state, value

    options: Any = {"static_argnums": (0, 7)} if task.static else {"static_argnums": 0}
    jitted = jax.jit(watch(train_step), **options)

    def step(held: Any, batch: Any, *train: bool) -> Any:
        apply_fn, *held = held
        *held, loss = jitted(apply_fn, *batch, *held, *train)
        return (apply_fn, *held), loss

    def fresh(module: bool = False, new_tx: bool = False, sharding: Any = None) -> Any:
        model, made_tx = make(module, new_tx)
        variables = start_of(task, sharding)
        state, params = core.pop(variables, "params")
        return model.apply, key_of(), made_tx.init(params), params, state

    def evaluate(apply_fn: Any, params: Any, state: Any, x: Any) -> Any:
        return apply_fn({"params": params, **state}, x, train=False)

    evaluating = jax.jit(evaluate, static_argnums=0)

    return Peer(
        GUIDE,
        step if not task.static else lambda held, batch, train=True: step(held, batch, train),
        fresh,
        lambda held, x: evaluating(held[0], *held[3:], x),
        lambda held: (*held[:2], *through_msgpack(held[2:])),
        lambda sharding: fresh(sharding=sharding),
    )


def by_hand(task: Task, watch: Watch) -> Peer:
    """The same loop as an expert writes it: the model closed over, one donated tuple, all of it and each batch placed.

    What a model sows is taken out of the state. What the expert does not see, such as a state that changes its shape at
    the first step, is not mended.
    """
    model, tx = made(task)()

    def train_step(carry: Any, batch: Any, train: bool = True) -> Any:
        count, params, state, opt_state, keys = carry

        def objective(params: Any) -> Any:
            variables = {"params": params, **state}
            pred, updated = model.apply(variables, batch[0], train=train, mutable=[*state, *task.sown], rngs=used)
            return loss_of(pred, batch[1]), {name: tree for name, tree in updated.items() if name not in task.sown}

        split = {name: jax.random.split(key) for name, key in keys.items()}
        keys, used = ({name: each[i] for name, each in split.items()} for i in (0, 1))
        (loss, updated), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (count + 1, optax.apply_updates(params, updates), updated, opt_state, keys), loss

    def fresh(module: bool = False, new_tx: bool = False) -> Any:
        state, params = core.pop(start_of(task), "params")
        for name in task.sown:
            state, _ = core.pop(state, name)
        opt_state = (task.make_tx() if new_tx else tx).init(params)
        held = jnp.zeros((), jnp.int32), params, state, opt_state, {"dropout": key_of()} if task.draws else {}
        return jax.device_put(held, jax.devices()[0]) if task.pinned else held

    def beside(carry: Any, batch: Any) -> Any:
        """The step of a batch that is put where the carry is, wherever it comes from."""
        alone = len(carry[0].devices()) == 1
        return jitted(carry, jax.device_put(batch, carry[0].sharding) if alone else batch)

    def evaluate(carry: Any, x: Any) -> Any:
        return model.apply({"params": carry[1], **carry[2]}, x, train=False)

    jitted = jax.jit(watch(train_step), **flag(task, donate_argnums=0))
    step = beside if task.pinned else jitted
    return Peer(HAND, step, fresh, jax.jit(evaluate), through_msgpack, lambda at: jax.device_put(fresh(), at))


class TrainState(train_state.TrainState):  # type: ignore[misc, unused-ignore]
    """The subclass of Flax's guides on batch normalization and on dropout."""

    batch_stats: Any = None
    key: Any = None


def of_train_state(task: Task, watch: Watch, donate: bool = False) -> Peer:
    """A TrainState subclass; at its best donated, and all of it placed at once."""
    make = made(task)

    def train_step(state: Any, batch: Any, train: bool = True) -> Any:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            pred, updates = state.apply_fn(variables, batch[0], train=train, mutable=["batch_stats"], rngs=rngs)
            return loss_of(pred, batch[1]), updates

        rngs = {"dropout": jax.random.fold_in(state.key, state.step)} if task.draws else {}

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(batch_stats=updates.get("batch_stats", {})), loss

    def fresh(module: bool = False, new_tx: bool = False, sharding: Any = None) -> Any:
        model, tx = make(module, new_tx)
        variables = start_of(task, sharding)
        create: Any = TrainState.create
        held = {"batch_stats": variables.get("batch_stats", {}), "key": key_of() if task.draws else None}
        return create(apply_fn=model.apply, params=variables["params"], tx=tx, **held)

    def evaluate(state: Any, x: Any) -> Any:
        return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, train=False)

    def placed(sharding: Any) -> Any:
        return jax.device_put(fresh(), sharding) if donate else fresh(sharding=sharding)

    jitted = jax.jit(watch(train_step), **flag(task, donate_argnums=0 if donate else ()))
    return Peer(TRAIN_STATE + BEST * donate, jitted, fresh, jax.jit(evaluate), through_msgpack, placed)


def has_tree_mode() -> bool:
    """Whether this version of Flax has `nnx.jit(graph=False)`."""
    return "graph" in inspect.signature(nnx.jit).parameters


def of_nnx(task: Task, watch: Watch, name: str = NNX, donate: bool = False) -> Peer:
    """`nnx.jit` over model and optimizer, in tree mode, or with both bound by `cached_partial` or `jit_partial`.

    In it NNX's own lines, or the one function of `substrax.spmd` that stands for them.
    """
    any_nnx: Any = nnx
    mode: Any = {"graph": False} if name in (TREE, PARTIAL) else {}
    tx = task.make_tx()
    takes_model = "model" in inspect.signature(nnx.Optimizer.update).parameters  # flax 0.11

    def train_step(model: Any, optimizer: Any, x: Any, y: Any, train: bool = True) -> Any:
        def loss_fn(model: Any, batch: Any) -> Any:
            return loss_of(model(batch[0], train), batch[1])

        if name == SUBSTRAX:
            spmd: Any = import_module("substrax.spmd")
            loss = spmd.spmd_train_step(model, optimizer, loss_fn, (x, y))
        else:
            loss, grads = any_nnx.value_and_grad(loss_fn, **mode)(model, (x, y))
            optimizer.update(model, grads) if takes_model else optimizer.update(grads)
        if nets.has(task.layers, nets.Sow) and not mode:  # as the documentation of `sow` says: popped, or they pile up
            nnx.pop(model, nets.Sown)
        return loss

    def fresh(module: bool = False, new_tx: bool = False, sharding: Any = None) -> Any:
        model = nets.Nnx(task.layers, task.shape[-1], task.compute, rngs=nnx.Rngs(0))
        if task.dtype:
            nnx.update(model, cast_to(task.dtype, nnx.state(model)))
        if sharding is not None and not donate:
            nnx.update(model, jax.device_put(nnx.state(model), sharding))
        optimizer = any_nnx.Optimizer(model, task.make_tx() if new_tx else tx, wrt=nnx.Param, **mode)
        if sharding is not None and donate:
            nnx.update((model, optimizer), jax.device_put(nnx.state((model, optimizer)), sharding))
        return bound(model, optimizer)

    both = 0 if name == PARTIAL else (0, 1)  # to `jit_partial`, all that is bound is one argument
    watched, options = watch(train_step), flag(task, donate_argnums=both if donate else ()) | mode
    jitted = any_nnx.jit(watched, **options)

    def bound(model: Any, optimizer: Any) -> Any:
        if name == PARTIAL:
            return any_nnx.jit_partial(watched, model, optimizer, **options), model, optimizer
        return any_nnx.cached_partial(jitted, model, optimizer) if name == CACHED else None, model, optimizer

    def step(held: Any, batch: Any, **train: bool) -> Any:
        call, model, optimizer = held
        return held, call(*batch, **train) if call else jitted(model, optimizer, *batch, **train)

    def evaluate(model: Any, x: Any) -> Any:
        return model(x, False)

    def restored(held: Any) -> Any:
        _, model, optimizer = held
        nnx.update((model, optimizer), jax.tree.map(np.asarray, nnx.state((model, optimizer))))
        return held if name == PARTIAL else bound(model, optimizer)  # which reads what its variables hold

    evaluating = any_nnx.jit(evaluate, **mode)
    return Peer(
        name + BEST * donate,
        step,
        fresh,
        lambda held, x: evaluating(held[1], x),
        restored,
        lambda sharding: fresh(sharding=sharding),
    )


def of_equinox(task: Task, watch: Watch, donate: bool = False) -> Peer:
    """Equinox's example of stateful layers: `make_with_state`, one example at a time under `vmap`, `filter_jit`."""
    from ._equinox import Network
    from ._equinox import eqx as any_eqx

    optim = task.make_tx()

    def compute_loss(model: Any, state: Any, xs: Any, ys: Any, keys: Any, train: bool) -> Any:
        def single(x: Any, state: Any, key: Any) -> Any:
            x = x.transpose(2, 0, 1) if x.ndim == 3 else x  # channels first
            return model(x, state, not train, key)

        batched = jax.vmap(single, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        pred, state = batched(cast_to(task.compute, xs), state, keys)
        return loss_of(pred, ys), state

    def train_step(model: Any, state: Any, opt_state: Any, key: Any, xs: Any, ys: Any, train: bool = True) -> Any:
        def in_compute(model: Any, *rest: Any) -> Any:
            return compute_loss(cast_to(task.compute, model), *rest)

        gradient = any_eqx.filter_value_and_grad(in_compute, has_aux=True)
        key, used = jax.random.split(key)
        keys = jax.random.split(used, len(xs)) if task.draws else None
        (loss, state), grads = gradient(model, state, xs, ys, keys, train)
        updates, opt_state = optim.update(grads, opt_state, any_eqx.filter(model, any_eqx.is_inexact_array))
        return any_eqx.apply_updates(model, updates), state, opt_state, key, loss

    def first(batch: Any, model: Any, state: Any, opt_state: Any, key: Any, train: bool = True) -> Any:
        xs, ys = batch
        return train_step(model, state, opt_state, key, xs, ys, train)

    first.__name__ = train_step.__name__
    # what is kept comes first in Equinox's "all-except-first"
    best = any_eqx.filter_jit(watch(first), donate="all-except-first")
    usual = any_eqx.filter_jit(watch(train_step))

    def step(held: Any, batch: Any, **train: bool) -> Any:
        *held, loss = best(batch, *held, **train) if donate else usual(*held, *batch, **train)
        return held, loss

    def fresh(module: bool = False, new_tx: bool = False) -> Any:
        model, state = any_eqx.nn.make_with_state(Network)(task.layers, task.shape[-1], task.dtype)
        model = cast_to(task.dtype, model)
        opt_state = (task.make_tx() if new_tx else optim).init(any_eqx.filter(model, any_eqx.is_inexact_array))
        return [model, state, opt_state, key_of()]

    @any_eqx.filter_jit  # type: ignore[untyped-decorator, unused-ignore]
    def evaluate(model: Any, state: Any, x: Any) -> Any:
        model = any_eqx.nn.inference_mode(model)
        return jax.vmap(lambda x: model(x, state, True)[0], axis_name="batch")(x)

    def restored(held: Any) -> Any:
        file = io.BytesIO()
        *kept, key = held
        any_eqx.tree_serialise_leaves(file, kept)
        file.seek(0)
        return [*any_eqx.tree_deserialise_leaves(file, kept), key]

    def placed(sharding: Any) -> Any:
        return [*any_eqx.filter_shard(tuple(fresh()), sharding)]

    return Peer(EQUINOX + BEST * donate, step, fresh, lambda held, x: evaluate(held[0], held[1], x), restored, placed)


def of_haiku(task: Task, watch: Watch, donate: bool = False) -> Peer:
    """Haiku's examples with `transform_with_state`."""
    import haiku

    hk: Any = haiku
    network = hk.transform_with_state(nets.haiku(task.layers))
    tx = task.make_tx()

    def train_step(params: Any, state: Any, opt_state: Any, key: Any, x: Any, y: Any, train: bool = True) -> Any:
        def loss_fn(params: Any) -> Any:
            params, inputs = cast_to(task.compute, (params, x))
            pred, new_state = network.apply(params, state, used, inputs, train)
            return loss_of(pred, y), new_state

        key, used = jax.random.split(key)
        (loss, state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, key, loss

    jitted = jax.jit(watch(train_step), **flag(task, donate_argnums=(0, 1, 2, 3) if donate else ()))

    def step(held: Any, batch: Any, **train: bool) -> Any:
        *held, loss = jitted(*held, *batch, **train)
        return held, loss

    def fresh(module: bool = False, new_tx: bool = False, sharding: Any = None) -> Any:
        params, state = cast_to(task.dtype, network.init(key_of(), task.example))
        if sharding is not None and not donate:
            params, state = jax.device_put((params, state), sharding)
        held = [params, state, (task.make_tx() if new_tx else tx).init(params), key_of()]
        return jax.device_put(held, sharding) if sharding is not None and donate else held

    def evaluate(params: Any, state: Any, x: Any) -> Any:
        return network.apply(params, state, None, x, False)[0]

    evaluating = jax.jit(evaluate)
    return Peer(
        HAIKU + BEST * donate,
        step,
        fresh,
        lambda held, x: evaluating(*held[:2], x),
        lambda held: [*jax.tree.map(np.asarray, held[:3]), held[3]],
        lambda sharding: fresh(sharding=sharding),
    )


def _best(build: Any) -> Any:
    return lambda task, watch: build(task, watch, donate=True)


def _nnx(name: str, donate: bool = False) -> Any:
    return lambda task, watch: of_nnx(task, watch, name, donate)


PEERS: Mapping[str, Callable[[Task, Watch], Peer]] = {
    OURS: ours,
    HAND: by_hand,
    GUIDE: guides_loop,
    TRAIN_STATE: of_train_state,
    TRAIN_STATE + BEST: _best(of_train_state),
    NNX: _nnx(NNX),
    NNX + BEST: _nnx(NNX, True),
    TREE + BEST: _nnx(TREE, True),
    CACHED + BEST: _nnx(CACHED, True),
    PARTIAL + BEST: _nnx(PARTIAL, True),
    SUBSTRAX + BEST: _nnx(SUBSTRAX, True),
    EQUINOX: of_equinox,
    EQUINOX + BEST: _best(of_equinox),
    HAIKU: of_haiku,
    HAIKU + BEST: _best(of_haiku),
}


# One form of each, as it is usually written; the partial ones are NNX's own answers to the cost of nnx.jit.
USUAL = (OURS, HAND, GUIDE, TRAIN_STATE, NNX, CACHED + BEST, PARTIAL + BEST, EQUINOX, HAIKU)


SAID = ("of the step", "jax_explain_cache_misses logs", "assert_max_traces raises")
"""Beside the implementations: what is said of a situation."""


def missing() -> dict[str, str]:
    """Peers that cannot run here, and why."""
    gone: dict[str, str] = {}
    for name, package in ((EQUINOX, "equinox"), (HAIKU, "haiku")):
        if find_spec(package) is None:
            gone |= dict.fromkeys((name, name + BEST), f"skipped: {package} is not installed")
    if find_spec("substrax") is None:
        gone[SUBSTRAX + BEST] = "skipped: substrax is not installed; 0.1.22 takes no jax but 0.11.1"
    if not has_tree_mode():
        gone[TREE + BEST] = f"skipped: flax {flax.__version__} has no tree mode"
    if not hasattr(nnx, "jit_partial"):
        gone[PARTIAL + BEST] = f"skipped: flax {flax.__version__} has no nnx.jit_partial"
    return gone


def present(names: Sequence[str] = tuple(PEERS)) -> list[str]:
    """Those of the peers that can run here."""
    return [name for name in names if name not in missing()]


def build(name: str, task: Task, watch: Watch = lambda fn: fn) -> Peer:
    """Makes a peer; `watch` wraps the function that it is going to jit."""
    return PEERS[name](task, watch)


class DisagreementError(SystemExit):
    """Contenders compute different functions: nothing is timed."""


def check_agree(losses: Mapping[str, Sequence[float]], tolerance: float = 1e-3) -> None:
    """Refuses contenders whose losses differ from the first one's.

    Raises:
        DisagreementError: which differ, and their losses.
    """
    (base, expected), *others = losses.items()
    wrong = [name for name, each in others if not np.allclose(each, expected, rtol=tolerance, atol=1e-6)]
    if wrong:
        told = "\n".join(f"  {name}: {[float(f'{each:.6g}') for each in losses[name]]}" for name in [base, *wrong])
        raise DisagreementError(f"benchmarks: nothing was timed, the losses differ from those of {base}:\n{told}")


def losses_of(step: Any, held: Any, batch: Any, count: int = 5) -> list[float]:
    """The losses of a few steps."""
    losses = []
    for _ in range(count):
        held, loss = step(held, batch)
        losses.append(float(loss))
    return losses


def refusal(error: Exception) -> str:
    """What a library said instead of going on, in a sentence."""
    return f"refuses: `{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}`"


def stepper(peer: Peer, batch: Any, count: int = 1) -> Stepper:
    """Runs a peer's training loop."""
    return Stepper(peer.step, peer.fresh(), batch, count)
