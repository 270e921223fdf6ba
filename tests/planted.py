"""Faults planted one at a time in a good step, in five styles: what `test_explain` looks for and the page lists."""

from collections.abc import Callable
from typing import Any

import equinox as any_eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state
from jax.sharding import NamedSharding, PartitionSpec

import flaxsplit as fs
from flaxsplit._refusals.explain import KINDS

eqx: Any = any_eqx
any_nnx: Any = nnx
TX = optax.adam(1e-3)
X = np.linspace(-1.0, 1.0, 32, dtype=np.float32).reshape(8, 4)
LARGE = np.ones((520, 520), np.float32)
BIG = jnp.asarray(LARGE)
WIDE = 128

Call = tuple[Any, Any, Any, tuple[Any, ...]]
"""A step, its carry, its batch, and what else it takes."""


# ---- what each style shares: a running mean beside the model, and the loss around it


def start_meter(fault: str) -> dict[str, Any]:
    """What is carried beside params and statistics."""
    mean = jnp.zeros(4) + 0.0
    meter: dict[str, Any] = {"mean": mean, "total": jnp.zeros((), jnp.float32)}
    changes: dict[str, dict[str, Any]] = {
        "shape": {"mean": jnp.zeros((1, 4)).sum()},
        "dtype": {"mean": jnp.zeros(4, jnp.bfloat16)},
        "weak type": {"total": jnp.asarray(0.0)},
        "static number": {"total": 0.0},
        "never read": {"spare": jnp.zeros(3)},
        "host carry": {"mean": np.zeros(4, np.float32)},
        "buffer twice": {"copy": mean},
    }
    return meter | changes.get(fault, {})


def next_meter(meter: dict[str, Any], x: Any, key: Any, fault: str) -> dict[str, Any]:
    """A step's part of it."""
    new = meter | {"mean": 0.9 * meter["mean"] + 0.1 * x.mean(0), "total": meter["total"] + x.sum().astype("float32")}
    if "copy" in meter:
        new["copy"] = 0.5 * meter["copy"] + 0.5 * meter["mean"]
    if fault == "structure":
        new["seen"] = x.sum()
    if fault == "state dropped":
        new["mean"] = meter["mean"]
    if fault == "constants":
        new["total"] = new["total"] + (BIG * x.sum()).sum()
    if fault == "callback":
        jax.debug.print("{}", x.sum())
    if fault == "key constant":
        new["mean"] = new["mean"] + jax.random.normal(jax.random.key(0), (4,))
    if fault == "cast back":
        wide = jnp.broadcast_to(x.sum(), BIG.shape)
        new["total"] = new["total"] + jnp.sin(wide).astype(jnp.bfloat16).astype(jnp.float32).sum()
    if fault == "key drawn twice":
        new["mean"] = new["mean"] + jax.random.normal(key, (4,)) + jax.random.normal(key, (2, 4)).sum(0)
    return new


def keys_of(key: Any, fault: str) -> tuple[Any, Any]:
    """The key to carry on and the one to use."""
    if fault == "key unchanged":
        return key, key
    carried, used = jax.random.split(key)
    return carried, used


def data_of(fault: str) -> tuple[Any, tuple[Any, ...]]:
    """The batch, and a table beside it."""
    return jnp.asarray(X), (LARGE,) if fault == "host constants" else ()


def in_half(tree: Any) -> Any:
    """Casts what is floating to bf16."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def squares(pred: Any, table: tuple[Any, ...]) -> Any:
    """The loss; a table has a part in it."""
    return (pred.astype(jnp.float32) ** 2).mean() + sum(each.mean() for each in table)


def donated(fault: str) -> Any:
    """What a step by hand donates."""
    return {"not donated": (), "donated in vain": (0, 1)}.get(fault, (0,))


def update(params: Any, opt_state: Any, grads: Any) -> Any:
    """The optimizer's part."""
    updates, opt_state = TX.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


# ---- Linen, for three of the styles


class Net(nn.Module):
    """Dense, BatchNorm, Dropout, and a param that the output does not depend on, where that is asked for."""

    spare: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Maps `[batch, 4]` to `[batch, 1]`."""
        if self.spare:
            self.param("spare", nn.initializers.ones, (3,))
        x = nn.Dense(4, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        return nn.Dense(1, dtype=self.dtype)(nn.Dropout(0.5, deterministic=not train)(x))


def linen(fault: str) -> tuple[Any, dict[str, Any]]:
    """The model and its variables, of which the fault may want others."""
    model = Net(spare=fault == "no gradient")
    variables: dict[str, Any] = {**model.init(jax.random.key(0), X, train=False)}
    if fault == "f32 work":
        variables["params"] = in_half(variables["params"])
    if fault == "half statistics":
        variables["batch_stats"] = in_half(variables["batch_stats"])
    return model, variables


def kept(new: Any, old: Any, fault: str) -> Any:
    """Statistics in the dtype that they have."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, old) if fault == "half statistics" else new


def by_hand(fault: str) -> Call:
    """A dict of everything, `jax.jit` with donation."""
    model, variables = linen(fault)
    params, stats = variables["params"], variables["batch_stats"]
    batch, table = data_of(fault)

    def step(carry: Any, batch: Any, *table: Any) -> Any:
        key, used = keys_of(carry["key"], fault)

        def loss_fn(params: Any) -> Any:
            variables, train = {"params": params, "batch_stats": carry["stats"]}, fault != "statistics unchanged"
            options = {"mutable": ["batch_stats"], "rngs": {"dropout": used}}
            pred, new = model.apply(variables, batch, train=train, **options)
            return squares(pred, table), kept(new["batch_stats"], carry["stats"], fault)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(carry["params"])
        params, opt_state = update(carry["params"], carry["opt_state"], grads)
        meter = next_meter(carry["meter"], batch, jax.random.fold_in(used, 1), fault)
        return {"params": params, "stats": stats, "opt_state": opt_state, "key": key, "meter": meter}, loss

    carry = {"params": params, "stats": {"batch_stats": stats}["batch_stats"], "opt_state": TX.init(params)}
    carry |= {"key": jax.random.key(1), "meter": start_meter(fault)}
    return jax.jit(step, donate_argnums=donated(fault)), carry, batch, table


class TrainState(train_state.TrainState):  # type: ignore[misc, unused-ignore]
    """As in Flax's guides."""

    batch_stats: Any = None
    key: Any = None
    meter: Any = None


def of_train_state(fault: str) -> Call:
    """A `TrainState` subclass."""
    model, variables = linen(fault)
    batch, table = data_of(fault)

    def step(state: Any, batch: Any, *table: Any) -> Any:
        key, used = keys_of(state.key, fault)

        def loss_fn(params: Any) -> Any:
            variables, train = {"params": params, "batch_stats": state.batch_stats}, fault != "statistics unchanged"
            options = {"mutable": ["batch_stats"], "rngs": {"dropout": used}}
            pred, new = state.apply_fn(variables, batch, train=train, **options)
            return squares(pred, table), kept(new["batch_stats"], state.batch_stats, fault)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        meter = next_meter(state.meter, batch, jax.random.fold_in(used, 1), fault)
        return state.apply_gradients(grads=grads).replace(batch_stats=stats, key=key, meter=meter), loss

    create: Any = TrainState.create
    held = {"batch_stats": variables["batch_stats"], "key": jax.random.key(1), "meter": start_meter(fault)}
    carry = create(apply_fn=model.apply, params=variables["params"], tx=TX, **held)
    return jax.jit(step, donate_argnums=donated(fault)), carry, batch, table


def with_flaxsplit(fault: str) -> Call:
    """Combinators; the meter is a collection of its own."""
    model, variables = linen(fault)
    batch, table = data_of(fault)
    apply: Any = fs.with_mutable(model, mutable=["batch_stats"])
    params, state = fs.split_params(variables)
    state |= {"meter": start_meter(fault), "rngs": {"dropout": jax.random.key(1)}}

    def loss_fn(params: Any, state: Any, batch: Any, *table: Any) -> Any:
        key, used = keys_of(state["rngs"]["dropout"], fault)
        stats, train = {"batch_stats": state["batch_stats"]}, fault != "statistics unchanged"
        pred, new = apply(params, stats, batch, train=train, rngs={"dropout": used})
        meter = next_meter(state["meter"], batch, jax.random.fold_in(used, 1), fault)
        return squares(pred, table), {**kept(new, stats, fault), "meter": meter, "rngs": {"dropout": key}}

    carry = fs.init_carry(params, state, TX)
    if fault in ("host carry", "buffer twice", "weak type"):  # which init_carry mends
        carry = carry._replace(state=carry.state | {"meter": start_meter(fault)})
    step: Any = fs.with_optimizer(loss_fn, TX)
    donate: Any = donated(fault)
    return jax.jit(step, donate_argnums=donate), carry, batch, table


# ---- Equinox


class EquinoxNet(eqx.Module):  # type: ignore[misc, unused-ignore]
    """The same network for one example."""

    first: Any
    norm: Any
    drop: Any
    last: Any
    spare: Any

    def __init__(self, key: Any, spare: bool) -> None:
        self.first, self.last = eqx.nn.Linear(4, 4, key=key), eqx.nn.Linear(4, 1, key=key)
        self.norm, self.drop = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch"), eqx.nn.Dropout(0.5)
        self.spare = jnp.ones(3) if spare else None

    def __call__(self, x: Any, state: Any, key: Any) -> Any:
        """Maps `[4]` to `[1]`."""
        x, state = self.norm(self.first(x), state)
        return self.last(self.drop(x, key=key)), state


def of_equinox(fault: str) -> Call:
    """`make_with_state`, `vmap`, `filter_jit`."""
    model, state = eqx.nn.make_with_state(EquinoxNet)(jax.random.key(0), fault == "no gradient")
    model = eqx.nn.inference_mode(model) if fault == "statistics unchanged" else model
    params, static = eqx.partition(model, eqx.is_inexact_array)
    params = in_half(params) if fault == "f32 work" else params
    state = in_half(state) if fault == "half statistics" else state
    batch, table = data_of(fault)

    def step(carry: Any, batch: Any, *table: Any) -> Any:
        model, state, opt_state, key, meter = carry
        key, used = keys_of(key, fault)

        def loss_fn(model: Any) -> Any:
            mapped = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
            pred, new = mapped(batch, state, jax.random.split(used, len(batch)))
            return squares(pred, table), kept(new, state, fault)

        (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        updates, opt_state = TX.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        meter = next_meter(meter, batch, jax.random.fold_in(used, 1), fault)
        return (eqx.apply_updates(model, updates), state, opt_state, key, meter), loss

    donate = "none" if fault == "not donated" else "all"
    carry = (eqx.combine(params, static), state, TX.init(params), jax.random.key(1), start_meter(fault))
    return eqx.filter_jit(step, donate=donate), carry, batch, table


# ---- NNX, by its functional API


class NnxNet(nnx.Module):
    """The same network."""

    def __init__(self, spare: bool) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5)
        if spare:
            self.spare = nnx.Param(jnp.ones(3))

    def __call__(self, x: Any, rngs: Any) -> Any:
        """Maps `[batch, 4]` to `[batch, 1]`."""
        drop: Any = self.drop
        return self.last(drop(self.norm(self.first(x)), rngs=rngs))


def of_nnx(fault: str) -> Call:
    """`nnx.split`, `jax.jit`, `nnx.merge`."""
    module: Any = NnxNet(fault == "no gradient")
    if fault == "statistics unchanged":
        module.eval()
    graphdef, params, stats = any_nnx.split(module, nnx.Param, ...)
    params = in_half(params) if fault == "f32 work" else params
    stats = in_half(stats) if fault == "half statistics" else stats
    batch, table = data_of(fault)

    def step(carry: Any, batch: Any, *table: Any) -> Any:
        params, stats, opt_state, key, meter = carry
        key, used = keys_of(key, fault)

        def loss_fn(params: Any) -> Any:
            merged = any_nnx.merge(graphdef, params, jax.tree.map(jnp.asarray, stats))  # of this trace
            pred = merged(batch, nnx.Rngs(dropout=used))
            return squares(pred, table), kept(any_nnx.state(merged, nnx.BatchStat), stats, fault)

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params, opt_state = update(params, opt_state, grads)
        meter = next_meter(meter, batch, jax.random.fold_in(used, 1), fault)
        return (params, stats, opt_state, key, meter), loss

    carry = (params, stats, TX.init(params), jax.random.key(1), start_meter(fault))
    return jax.jit(step, donate_argnums=donated(fault)), carry, batch, table


# ---- on a mesh: a matrix, and a batch that is cut


def on_a_mesh(fault: str, style: str) -> Call:
    """Eight devices; the params are cut where their optimizer state is to be compared with them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    weights = {"w": jax.device_put(jnp.ones((WIDE, WIDE)), cut if fault == "optimizer replicated" else whole)}
    moments = jax.tree.map(lambda leaf: jax.device_put(leaf, whole), TX.init({"w": jnp.ones((WIDE, WIDE))}))
    if fault != "optimizer replicated":
        moments = TX.init({"w": jnp.ones((WIDE, WIDE))}) if fault == "placement" else moments
    batch = jax.device_put(jnp.ones((WIDE, WIDE)), whole if fault == "batch replicated" else cut)
    if fault == "placement":
        moments = jax.device_put(moments)

    def loss_of(params: Any, batch: Any) -> Any:
        return ((batch @ params["w"]) ** 2).mean()

    if style == "flaxsplit":
        carry: Any = fs.Carry(jax.device_put(jnp.int32(0), whole), weights, {}, moments)
        loss_fn: Any = lambda params, state, batch: (loss_of(params, batch), state)  # noqa: E731
        step: Any = fs.with_optimizer(loss_fn, TX)
        return fs.jit_step(step, like=None if fault == "placement" else carry), carry, batch, ()
    if style == "TrainState":
        carry = train_state.TrainState(jax.device_put(jnp.int32(0), whole), lambda: None, weights, TX, moments)
    else:
        carry = {"params": weights, "opt_state": moments}

    def by_hand(carry: Any, batch: Any) -> Any:
        is_dict = isinstance(carry, dict)
        params = carry["params"] if is_dict else carry.params
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        if not is_dict:
            return carry.apply_gradients(grads=grads), loss
        params, opt_state = update(params, carry["opt_state"], grads)
        return {"params": params, "opt_state": opt_state}, loss

    places = jax.tree.map(lambda leaf: leaf.sharding, carry)
    options: Any = {} if fault == "placement" else {"out_shardings": (places, None)}
    return jax.jit(by_hand, donate_argnums=0, **options), carry, batch, ()


STYLES: dict[str, Callable[[str], Call]] = {
    "by hand": by_hand,
    "TrainState": of_train_state,
    "Equinox": of_equinox,
    "NNX": of_nnx,
    "flaxsplit": with_flaxsplit,
}
MESH = ("placement", "batch replicated", "optimizer replicated")

# The leaf or operation that a finding must name, in each style; a style that is left out cannot have the fault.
_METER = {
    "by hand": "carry['meter']",
    "TrainState": "carry.meter",
    "Equinox": "carry[4]",
    "NNX": "carry[4]",
    "flaxsplit": "carry.state['meter']",
}
_OF_METER = {
    "structure": "['seen']",
    "shape": "['mean']",
    "dtype": "['mean']",
    "weak type": "['total']",
    "static number": "['total']",
    "state dropped": "['mean']",
    "never read": "['spare']",
    "host carry": "['mean']",
    "buffer twice": "['mean']",
}
WHERE: dict[str, dict[str, str]] = {
    **{kind: {style: path + leaf for style, path in _METER.items()} for kind, leaf in _OF_METER.items()},
    "statistics unchanged": {
        "by hand": "carry['stats']['BatchNorm_0']['mean']",
        "TrainState": "carry.batch_stats['BatchNorm_0']['mean']",
        "Equinox": "carry[1]",
        "NNX": "carry[1]['norm']['mean']",
        "flaxsplit": "carry.state['batch_stats']['BatchNorm_0']['mean']",
    },
    "key unchanged": {
        "by hand": "carry['key']",
        "TrainState": "carry.key",
        "Equinox": "carry[3]",
        "NNX": "carry[3]",
        "flaxsplit": "carry.state['rngs']['dropout']",
    },
    "no gradient": {
        "by hand": "carry['params']['spare']",
        "TrainState": "carry.params['spare']",
        "Equinox": "carry[0].spare",
        "NNX": "carry[0]['spare']",
        "flaxsplit": "carry.params['spare']",
    },
    "key constant": dict.fromkeys(STYLES, "random bits"),
    "key drawn twice": {
        "by hand": "carry['key']",
        "TrainState": "carry.key",
        "Equinox": "carry[3]",
        "NNX": "carry[3]",
        "flaxsplit": "carry.state['rngs']['dropout']",
    },
    "not donated": dict.fromkeys(STYLES, "carry"),
    "donated in vain": {style: "batch" for style in STYLES if style != "Equinox"},
    "constants": dict.fromkeys(STYLES, "f32[520,520]"),
    "f32 work": dict.fromkeys(STYLES, "dot_general"),
    "cast back": dict.fromkeys(STYLES, "cast: f32[520,520] -> bfloat16 -> float32"),
    "half statistics": {
        "by hand": "carry['stats']['BatchNorm_0']['mean']",
        "TrainState": "carry.batch_stats['BatchNorm_0']['mean']",
        "NNX": "carry[1]['norm']['mean']",
        "flaxsplit": "carry.state['batch_stats']['BatchNorm_0']['mean']",
    },
    "host constants": dict.fromkeys(STYLES, "args[0]"),
    "callback": dict.fromkeys(STYLES, "debug"),
    "placement": {
        "by hand": "carry['opt_state'][0].count",
        "TrainState": "carry.opt_state[0].count",
        "flaxsplit": "carry.opt_state[0].count",
    },
    "batch replicated": dict.fromkeys(("by hand", "TrainState", "flaxsplit"), "batch"),
    "optimizer replicated": {
        "by hand": "carry['opt_state'][0].mu['w']",
        "TrainState": "carry.opt_state[0].mu['w']",
        "flaxsplit": "carry.opt_state[0].mu['w']",
    },
}
REFUSED: dict[str, dict[str, str]] = {
    **{kind: {"flaxsplit": "StateDriftError"} for kind in ("structure", "shape", "dtype")},
    "half statistics": {"Equinox": "ValueError"},
}
for _kind, _by_style in REFUSED.items():
    for _style in _by_style:
        WHERE[_kind].pop(_style, None)
WHERE["static number"] = {"Equinox": WHERE["static number"]["Equinox"]}
WHERE["f64"] = {"by hand": "dot_general"}


def doubled() -> Call:
    """A batch of f64 beside params of f32."""

    def step(carry: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda w: ((batch @ w) ** 2).mean())(carry["w"])
        return {"w": carry["w"] - 0.1 * grads}, loss

    return jax.jit(step, donate_argnums=0), {"w": jnp.ones((4, 4), jnp.float32)}, X.astype(np.float64), ()


def plant(style: str, fault: str) -> Call:
    """The step of a style with one fault; of none with an empty word."""
    if fault == "f64":
        return doubled()
    return on_a_mesh(fault, style) if fault in MESH or fault == "mesh" else STYLES[style](fault)


def table() -> str:
    """Every kind by style: whether it is found, or refused before by an error, or cannot be."""
    rows = ["| kind | what | " + " | ".join(STYLES) + " |", "|---|---|" + "---|" * len(STYLES)]
    for kind, words in KINDS.items():
        refused = {style: f"`{error}`" for style, error in REFUSED.get(kind, {}).items()}
        cells = refused | dict.fromkeys(WHERE[kind], "found")
        told = " | ".join(cells.get(style, "") for style in STYLES)
        rows.append(f"| {words.group}: **{kind}** | {words.what} | {told} |")
    return "\n".join(rows)
