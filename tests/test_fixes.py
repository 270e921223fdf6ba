"""Every fix that a message prints, typed as printed: it runs, where the mistake failed.

Each case is a mistake, the code that its message prints, and the program around that code, where it needs one. `...` in
a fix stands for what only the user has. What is words and no code stands in `WORDS`, with the reason.
"""

import ast
import functools
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

import flaxsplit as fs
from flaxsplit import _refusals

from .flags import needs_jit, needs_promotion, needs_x32

pytestmark = [needs_jit, needs_promotion, needs_x32]
START = """
import functools
import flax, flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from flaxsplit import *
from flaxsplit import explain_step, from_nnx, to_nnx

class Model(nn.Module):
    axis_name: str | tuple[str, ...] | None = None
    drops: bool = False
    sows: bool = False
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x) if self.drops else x
        if self.sows:
            self.sow("intermediates", "x", x)
            self.sow("losses", "l2", (x**2).sum())
        return nn.Dense(1, name="head")(x)
    def decode(self, x):
        return x
    def encode(self, x):
        return x

x, y, key = jax.random.normal(jax.random.key(1), (8, 3)), jnp.ones((8, 1)), jax.random.key(0)
args, batch, train = (x,), (x, y), True
dropping, sowing, synced = Model(drops=True), Model(sows=True), Model("batch")
model = module = Model()
variables = module.init(key, x, train=False)
params, state = split_params(variables)
tx = optax.adam(0.1)
fn = apply = with_mutable(model)

def loss_fn(params, state, batch, key=None):
    out, new_state = fn(params, state, batch[0])
    return jnp.mean((out - batch[1]) ** 2), new_state

carry = init_carry(params, state, tx)
step = with_optimizer(loss_fn, tx)
"""


class Case(NamedTuple):
    """A mistake; a part of the fix that its message prints, or several; and the program, in which FIX stands for it."""

    wrong: str
    typed: str | tuple[str, ...]
    then: str = "FIX"
    own: str = ""  # what the user has where the fix has an ellipsis

    def program(self) -> str:
        """What is run after the mistake."""
        parts = (self.typed,) if isinstance(self.typed, str) else self.typed
        text = self.then
        for i, part in reversed([*enumerate(parts)]):
            text = text.replace(f"FIX{i}" if len(parts) > 1 else "FIX", part.replace("...", self.own or "..."))
        return text


def in_loss(reduced: bool = True, **options: str) -> str:
    """A loss whose last line is the fix, and a step of it; the loss is one number, or one for each example."""
    given = "".join(f", {name}={value}" for name, value in options.items())
    return f"""
def fixed(params, state, batch):
    out, new_state = apply(params, state, batch[0])
    per_example = (out - batch[1]) ** 2
    loss = {"per_example.mean()" if reduced else "per_example"}
    aux = out
    FIX
with_optimizer(fixed, tx{given})(carry, batch)
"""


def losing(result: str) -> str:
    """A step of a loss that returns something else."""
    return f"""
def wrong(params, state, batch):
    out, new_state = apply(params, state, batch[0])
    loss = jnp.mean((out - batch[1]) ** 2)
    return {result}
with_optimizer(wrong, tx)(carry, batch)
"""


RETRACED = """
step = jax.jit(assert_max_traces(lambda carry, batch: (carry, batch)))
step(FIRST)
step(SECOND)
"""


def retraced(first: str, second: str) -> str:
    """Two calls that differ."""
    return RETRACED.replace("FIRST", first).replace("SECOND", second)


MESH = """
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
FIX
"""
DROPS = "params, state = split_params(dropping.init({'params': key, 'dropout': key}, x))\n"
CASES = (
    # split_params, merge_state
    Case("split_params([x])", "split_params(module.init(key, x))"),
    Case("split_params(state)", "split_params(module.init(key, x))"),
    Case("variables = state\nsplit_params(variables)", "split_params({'params': {}, **variables})"),
    Case("variables = {'params': variables}\nsplit_params(variables)", "split_params(variables['params'])"),
    Case(
        "variables = {'params': {'params': {'w': x}}}\nsplit_params(variables)",
        "split_params(variables['params'])",
    ),
    Case("split_params(variables, trainable='Dense0/*')", "'Dense_0/*'", "split_params(variables, trainable=FIX)"),
    Case("split_params(variables, trainable='zzzzzzz')", "'head/*'", "split_params(variables, trainable=FIX)"),
    Case(
        "split_params(variables, trainable='!Dense_0/*')",
        "trainable=lambda path, leaf: not path.startswith('Dense_0/')",
        "split_params(variables, FIX)",
    ),
    Case(
        "split_params(variables, trainable={'tail': True})",
        "trainable=jax.tree.map(lambda leaf: ..., variables['params'])",
        "split_params(variables, FIX)",
        "leaf.ndim > 1",
    ),
    Case(
        "split_params(variables, trainable=jax.tree.map(jnp.ones_like, variables['params']))",
        "trainable=jax.tree.map(lambda leaf: leaf.ndim > 1, variables['params'])",
        "split_params(variables, FIX)",
    ),
    Case("split_params(variables, trainable=3)", "split_params(variables, trainable='head/*')"),
    Case(
        "variables = {'params': [x]}\nsplit_params(variables)",
        "split_params({'params': {'w': variables['params']}})",
    ),
    Case(
        "merge_state(params, {'params': params})",
        "params, state = split_params(variables, trainable=...); merge_state(params, state)",
        own="'head/*'",
    ),
    Case("merge_state(variables, state)", "params, state = split_params(variables)", "FIX\nmerge_state(params, state)"),
    Case("merge_state(state, params)", "merge_state(params, state)"),
    Case("fn(state, params, x)", "fn(params, state, *args)"),
    Case("fn(variables, state, x)", "params, state = split_params(variables)", "FIX\nfn(params, state, x)"),
    Case(
        "fn({'params': params}, state, x)",
        "params, state = split_params(variables)",
        "FIX\nfn(params, state, x)",
    ),
    # with_mutable
    Case("class MLP(Model):\n    pass\nwith_mutable(MLP)", "with_mutable(MLP(...))", own="axis_name=None"),
    Case("with_mutable({'params': {}})", "with_mutable(model)"),
    Case("with_mutable(model, method='generate')", "with_mutable(model, method=Model.decode)"),
    Case("with_mutable(model, method='encod')", "with_mutable(model, method='encode')"),
    Case(
        "with_mutable(nn.apply(Model.__call__, model), method='__call__')",
        ("with_mutable(model, method=Model.decode)", "with_mutable(nn.apply(Model.decode, model))"),
        "FIX0, FIX1",
    ),
    Case("with_mutable(fn)", "fn(params, state, x)"),
    Case(
        "module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))\nwith_mutable(module)",
        "fn, params, state = from_nnx(module)",
        "FIX\nfn(params, state, jnp.ones(2))",
    ),
    Case(
        "model = synced\nwith_mutable(model)(params, state, x)",
        "vmap_stateful(with_mutable(model), axis_name='batch')",
        "(FIX)(params, state, x)",
    ),
    Case(
        "with_mutable(model, mutable=['batch_stat'])(params, state, x)",
        "'batch_stats'",
        "with_mutable(model, mutable=[FIX])(params, state, x)",
    ),
    Case(
        "fn = model\nwith_mutable(fn, mutable=['params'])(params, state, x)",
        ("with_mutable(fn)", "mutable=True"),
        "FIX0(params, state, x)\nwith_mutable(fn, FIX1)(params, state, x)",
    ),
    Case(
        "class Writes(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        self.param('scale', nn.initializers.ones, ())\n"
        "        self.put_variable('params', 'scale', x.sum())\n"
        "        return x\n"
        "with_mutable(Writes())({'scale': jnp.ones(())}, {}, x)",
        "self.variable('counts', ...)",
        "class Counts(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        FIX.value += 1\n"
        "        return x\n"
        "with_mutable(Counts())({}, {'counts': {'n': jnp.zeros(())}}, x)",
        "'n', lambda: jnp.zeros(())",
    ),
    Case(
        "class Loop(nn.Module):\n"
        "    options: tuple = ()\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        def turn(self, i):\n"
        "            self.put_variable('counts', 'n', self.get_variable('counts', 'n') + 1)\n"
        "            return i + 1\n"
        "        self.variable('counts', 'n', jnp.zeros, ())\n"
        "        return nn.while_loop(lambda _, i: i < 3, turn, self, 0, **dict(self.options)) + x\n"
        "counts = {'counts': {'n': jnp.zeros(())}}\n"
        "with_mutable(Loop())({}, counts, x)",
        "carry_variables='counts'",
        "with_mutable(Loop(tuple(dict(FIX).items())))({}, counts, x)",
    ),
    Case(
        "fn = model\nwith_mutable(fn, mutable=False)(params, state, x, train=True)",
        ("with_mutable(fn, mutable=['batch_stats'])", "train=False"),
        "FIX0(params, state, x, train=True)\nwith_mutable(fn, mutable=False)(params, state, x, FIX1)",
    ),
    Case(
        "fn(params, {}, x)",
        ("params, state = split_params(module.init(key, x))", "fn(params, state, x)"),
        "FIX0\nFIX1",
    ),
    Case(
        "class Logs(nn.Module):\n"
        "    def __call__(self, x):\n"
        "        self.put_variable('log', 'last', x)\n"
        "        return x\n"
        "state = {}\n"
        "with_mutable(Logs())({}, state, x)",
        "state | {'log': ...}",
        "with_mutable(Logs())({}, FIX, x)",
        "{'last': 0 * x}",
    ),
    Case(
        "fn = sowing\nwith_mutable(fn, mutable=['batch_stats', 'intermediates'])(params, state, x)",
        "with_mutable(fn, capture='intermediates')",
        "(FIX)(params, state, x)",
    ),
    Case(
        "module = nn.Dense(2)\nwith_mutable(module)(split_params(nn.Dense(3).init(key, x))[0], {}, x)",
        "params, state = split_params(module.init(key, x))",
        "FIX\nwith_mutable(module)(params, state, x)",
    ),
    Case(
        "with_mutable(model, capture='intermediates')(params, state, x)",
        ("self.sow('intermediates', name, value)", "capture='intermediates'"),
        "class Sows(nn.Module):\n"
        "    def __call__(self, x):\n"
        "        name, value = 'x', x\n"
        "        FIX0\n"
        "        return x\n"
        "with_mutable(Sows(), FIX1)({}, {}, x)",
    ),
    Case(
        "model = sowing\nstate = state | {'losses': {'l2': (jnp.zeros(()),)}}\n"
        "loss = lambda params, state, x: (lambda out, new: (out.mean(), new))(*with_mutable(model)(params, state, x))\n"
        "with_optimizer(loss, tx)(init_carry(params, state, tx), x)",
        "with_mutable(model, capture='losses')",
        "(out, sown), new_state = (FIX)(params, state, x)",
    ),
    Case(
        "fn = model\nwith_mutable(fn, capture='batch_stats')(params, state, x)",
        "out, new_state = with_mutable(fn)(params, state, x)",
    ),
    Case(
        "class Perturbed(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return self.perturb('hidden', nn.Dense(3)(x))\n"
        "module = Perturbed()\n"
        "params, state = split_params(module.init(key, x))\n"
        "x = x[:5]\n"
        "with_mutable(module)(params, state, x)",
        "state | {'perturbations': module.init(key, x)['perturbations']}",
        "with_mutable(module)(params, FIX, x)\nwith_mutable(module)(params, {}, x)",
    ),
    Case("fn(params, state, x, True, {'dropout': key})", "fn(params, state, x, train)"),
    Case(
        "with_mutable(model)(params, state, x, mutable=['batch_stats'])",
        ("with_mutable(model, mutable=['batch_stats'])(params, state, x)", "with_mutable(model)"),
        "FIX0\nFIX1(params, state, x)",
    ),
    Case("fn(params, state, x, trian=True)", "train=", "fn(params, state, x, FIXTrue)"),
    Case(
        "class Evals(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train=False):\n"
        "        return nn.BatchNorm(use_running_average=not train)(x)\n"
        "model = Evals()\n"
        "params, state = split_params(model.init(key, x))\n"
        "fn = with_mutable(model)\n"
        "fn(params, state, x)",
        ("fn(params, state, x, train=True)", "with_mutable(fn, mutable=False)"),
        "FIX0\nfn = model\nFIX1(params, state, x)",
    ),
    Case(
        "fn(params, state | {'step': jnp.zeros(())}, x)",
        "state | {'extra': ...}",
        "fn(params, FIX, x)",
        "jnp.zeros(())",
    ),
    # rng_state, with_rngs
    Case("rng_state(noise=0)", "rng_state(noise=jax.random.key(0))"),
    Case("rng_state()", "rng_state(dropout=jax.random.key(0))"),
    Case(
        DROPS + "model = dropping\nwith_rngs(with_mutable(model))(params, state, x)",
        "init_carry(params, state | rng_state(dropout=key), tx)",
        "carry = FIX\nwith_rngs(with_mutable(model))(carry.params, carry.state, x)",
    ),
    Case(
        DROPS + "model, state = dropping, state | rng_state(dropout=key)\n"
        "fn = with_rngs(with_mutable(model))\nfn(params, state, x, rngs={'dropout': key})",
        ("fn(params, state, x)", "with_mutable(model.apply)(params, state, x, rngs=...)"),
        "FIX0\nFIX1",
        "{'dropout': key}",
    ),
    Case(
        DROPS + "model, state = dropping, state | rng_state(dropout=key)\nwith_mutable(model)(params, state, x)",
        "with_rngs(with_mutable(model))",
        "FIX(params, state, x)",
    ),
    Case(
        DROPS + "model = dropping\nwith_mutable(model)(params, state, x)",
        ("with_rngs(with_mutable(model))", "state | rng_state(dropout=key)"),
        "FIX0(params, FIX1, x)",
    ),
    Case(
        DROPS + "model = dropping\nwith_rngs(with_mutable(model))(params, state | rng_state(noise=key), x)",
        ("with_rngs(with_mutable(model))", "state | rng_state(dropout=key, noise=key)"),
        "FIX0(params, FIX1, x)",
    ),
    Case(
        DROPS + "fn = with_mutable(dropping.apply)\nfn(params, state, x, rngs=[key])",
        "rngs={'dropout': key}",
        "fn(params, state, x, FIX)",
    ),
    Case(
        DROPS + "fn = with_mutable(dropping.apply)\nfn(params, state, x, rngs={'dropout': 0})",
        "rngs={'dropout': jax.random.key(0)}",
        "fn(params, state, x, FIX)",
    ),
    Case(
        "class Layer(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x, _):\n"
        "        return nn.Dropout(0.5, deterministic=False)(x), None\n"
        "fn = lambda **options: with_mutable(nn.scan(Layer, length=2, **options)().apply)\n"
        "fn()({}, {}, x, None, rngs={'dropout': key})",
        "split_rngs={'dropout': True}",
        "fn(FIX)({}, {}, x, None, rngs={'dropout': key})",
    ),
    Case(
        DROPS + "with_rngs(with_mutable(dropping))(params, state | {'rngs': {'dropout': 0}}, x)",
        "state | rng_state(dropout=jax.random.key(0))",
        "with_rngs(with_mutable(dropping))(params, FIX, x)",
    ),
    # vmap_stateful
    Case(
        "vmap_stateful(fn)(params, state, x)",
        ("axis_name='batch'", "state_axes={'batch_stats': 0}"),
        "vmap_stateful(with_mutable(Model(FIX0)))(params, state, x)\n"
        "own = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)\n"
        "vmap_stateful(fn, FIX1)(params, own, x)",
    ),
    Case(
        "vmap_stateful(fn, axis_name=None)(params, state, x)",
        ("vmap_stateful(fn, axis_name='batch')", "nn.BatchNorm(..., axis_name='batch')"),
        "fn = with_mutable(synced)\nassert FIX1.axis_name == 'batch'\nFIX0(params, state, x)",
        "use_running_average=False",
    ),
    Case(
        "params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)\n"
        "vmap_stateful(fn, in_axes=None, params_axes=0, axis_name='member')(params, state, x)",
        "vmap_stateful(fn, params_axes=..., state_axes={'batch_stats': 0})",
        "state = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)\nFIX(params, state, jnp.stack([x, x]))",
        "0",
    ),
    Case(
        "model, xs = synced, x.reshape(2, 4, 3)\n"
        "vmap_stateful(vmap_stateful(with_mutable(model)))(params, state, xs)",
        ("vmap_stateful(fn, axis_name='inner_batch')", "axis_name=('batch', 'inner_batch')"),
        "fn = with_mutable(Model(FIX1))\nvmap_stateful(FIX0)(params, state, xs)",
    ),
    Case(
        "fn = lambda params, state, x, scale: (x * scale, state)\nvmap_stateful(fn)({}, {}, x, jnp.float32(2))",
        "in_axes=(0, None)",
        "vmap_stateful(fn, FIX)({}, {}, x, jnp.float32(2))",
    ),
    Case(
        "inner = lambda params, state, x: (x, state)\nfn = vmap_stateful(inner)\nfn(params, state, x=x)",
        ("fn(params, state, x)", "axis_size="),
        "FIX0\nvmap_stateful(inner, in_axes=None, FIX18)(params, state, x)",
    ),
    Case(
        "fn = lambda params, state, x: (x, state)\nvmap_stateful(fn, axis_size=3)({}, {}, x)",
        "in_axes=None",
        "vmap_stateful(fn, axis_size=3, FIX)({}, {}, x)\nvmap_stateful(fn)({}, {}, x)",
    ),
    Case(
        "fn = with_mutable(synced)\nvmap_stateful(fn, in_axes=(None, None, 0))(params, state, x)",
        "vmap_stateful(fn, in_axes=0)",
        "FIX(params, state, x)",
    ),
    Case(
        "fn = lambda params, state, x: (x, state)\nvmap_stateful(fn, in_axes={'x': 0})({}, {}, {'y': x})",
        "in_axes=0",
        "vmap_stateful(fn, FIX)({}, {}, {'y': x})",
    ),
    Case(
        "vmap_stateful(fn, state_axes={'stats': 0})(params, state, x)",
        "vmap_stateful(fn, state_axes={'batch_stats': 0})",
        "FIX(params, jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state), x)",
    ),
    Case(
        "vmap_stateful(lambda params, state, x: (x, {}))(params, state, x)",
        "return out, {**state, 'batch_stats': new_batch_stats}",
        "def fixed(params, state, x):\n"
        "    out, new_batch_stats = x, state['batch_stats']\n"
        "    FIX\n"
        "vmap_stateful(fixed)(params, state, x)",
    ),
    # settle_state, init_carry, adopt_carry
    Case(
        "settle_state(loss_fn, params, {'c': {'name': 'relu'}}, batch)",
        "params, state = split_params(module.init(key, x))",
        "FIX\nsettle_state(loss_fn, params, state, batch)",
    ),
    Case(
        "first, second = jax.devices()[:2]\n"
        "params, state = jax.device_put(params, first), jax.device_put(state, second)\n"
        "init_carry(params, state, tx)",
        "jax.device_put((params, state), sharding)",
        "sharding = jax.sharding.SingleDeviceSharding(first)\nparams, state = FIX\ninit_carry(params, state, tx)",
    ),
    Case(
        "restored = jax.device_get(carry)\nother = nn.Dense(2).init(key, x)\n"
        "adopt_carry(restored, init_carry(*split_params(other), tx))",
        "adopt_carry(restored, init_carry(params, state, tx))",
    ),
    Case("restored = carry\nadopt_carry(restored, {'w': 1.0})", "adopt_carry(restored, init_carry(params, state, tx))"),
    Case(
        "like, restored = carry, jax.device_get(params)\nadopt_carry(restored, like)",
        "carry = adopt_carry({'params': restored}, like, strict=False)",
    ),
    # value_and_grad, apply_gradients, with_optimizer
    Case(
        "state = {'batch_stats': jax.tree.map(lambda leaf: leaf.ravel()[:1], state['batch_stats'])}\n"
        "step(init_carry(params, state, tx), batch)",
        "state = settle_state(loss_fn, params, state, batch)",
        "FIX\nstep(init_carry(params, state, tx), batch)",
    ),
    Case(
        "state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)\n"
        "step(init_carry(params, state, tx), batch)",
        ("new.astype(old.dtype)", "state = settle_state(loss_fn, params, state, batch)"),
        "def cast(params, state, batch):\n"
        "    loss, new_state = loss_fn(params, state, batch)\n"
        "    return loss, jax.tree.map(lambda new, old: FIX0, new_state, state)\n"
        "with_optimizer(cast, tx)(init_carry(params, state, tx), batch)\n"
        "FIX1\nstep(init_carry(params, state, tx), batch)",
    ),
    Case(
        losing("loss, {**new_state, 'batch_stats': {}}"),
        "return out, {**state, ...}",
        "def fixed(params, state, batch):\n"
        "    out, new_state = loss_fn(params, state, batch)\n"
        "    FIX\n"
        "with_optimizer(fixed, tx)(carry, batch)",
        "**new_state",
    ),
    Case(losing("loss, (new_state, out)"), "return loss, new_state", in_loss()),
    Case(losing("new_state, loss"), "return loss, new_state", in_loss()),
    Case(losing("loss"), "return loss, new_state", in_loss()),
    Case(losing("loss, {'norm': loss, **new_state}"), "return (loss, aux), new_state", in_loss(has_aux="True")),
    Case(
        losing("loss, {'norm': loss, **new_state}"),
        "state | {'norm': ...}",
        "carry = init_carry(params, FIX, tx)\n"
        "def kept(params, state, batch):\n"
        "    loss, new_state = loss_fn(params, state, batch)\n"
        "    return loss, {**new_state, 'norm': {'last': loss}}\n"
        "with_optimizer(kept, tx)(carry, batch)",
        "{'last': jnp.zeros(())}",
    ),
    Case(losing("loss * jnp.ones(3), new_state"), "return loss.mean(), new_state", in_loss(reduced=False)),
    Case(losing("loss * 1j, new_state"), "return jnp.abs(loss).mean(), new_state", in_loss(reduced=False)),
    Case(losing("jnp.sum(out > 0), new_state"), "return jnp.mean(per_example), new_state", in_loss(reduced=False)),
    Case(losing("1.5, new_state"), "return jnp.mean(per_example), new_state", in_loss(reduced=False)),
    Case(losing("loss, out, new_state"), "return (loss, aux), new_state", in_loss(has_aux="True")),
    Case(
        losing("(loss, out), new_state").replace("with_optimizer(wrong", "loss_fn = wrong\nwith_optimizer(loss_fn"),
        ("value_and_grad(loss_fn, has_aux=True)", "with_optimizer(loss_fn, tx, has_aux=True)"),
        "FIX0(params, state, batch)\nFIX1(carry, batch)",
    ),
    Case(
        "with_optimizer(loss_fn, tx, has_aux=True)(carry, batch)",
        "return (loss, aux), new_state",
        in_loss(has_aux="True"),
    ),
    Case(
        "restored = carry._asdict()\nstep(restored, batch)",
        ("init_carry(params, state, tx)", "adopt_carry(restored, carry)"),
        "step(FIX0, batch)\nstep(FIX1, batch)",
    ),
    Case("step(carry._replace(state={'c': 'mean'}), batch)", "init_carry(params, state, tx)", "step(FIX, batch)"),
    Case(
        "count, carry = 7, carry._replace(step=jnp.zeros(2))\nstep(carry, batch)",
        ("init_carry(params, state, tx)", "carry._replace(step=jnp.int32(count))"),
        "step(FIX0, batch)\nstep(FIX1, batch)",
    ),
    Case(
        "variables = {'params': {'w': jnp.ones(3), 'count': jnp.int32(0)}}\n"
        "loss_fn = lambda params, state, batch: (params['w'].sum(), state)\n"
        "with_optimizer(loss_fn, tx)(init_carry(variables['params'], {}, tx), batch)",
        "split_params(variables, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))",
        "with_optimizer(loss_fn, tx)(init_carry(*FIX, tx), batch)",
    ),
    Case(
        "carry, tx = init_carry(params, state, optax.sgd(0.1)), optax.adam(0.1)\n"
        "with_optimizer(loss_fn, tx)(carry, batch)",
        "adopt_carry(carry, init_carry(carry.params, carry.state, tx), strict=False)",
        "with_optimizer(loss_fn, tx)(FIX, batch)",
    ),
    Case(
        "carry = init_carry(params, state, optax.adam(0.1, mu_dtype=jnp.bfloat16))\nstep(carry, batch)",
        "init_carry(carry.params, carry.state, tx)",
        "step(FIX, batch)",
    ),
    Case(
        "params = params | {'half': jnp.ones(3, jnp.bfloat16)}\n"
        "tx = optax.inject_hyperparams(optax.adam)(0.1)\n"
        "squares = lambda params, state, batch: (sum((leaf**2).sum().astype('float32') for leaf in "
        "jax.tree.leaves(params)), state)\n"
        "with_optimizer(squares, tx)(init_carry(params, {}, tx), batch)",
        "optax.inject_hyperparams(optax.adam, static_args=('b1', 'b2'))",
        "tx = FIX(0.1)\nwith_optimizer(squares, tx)(init_carry(params, {}, tx), batch)",
    ),
    Case(
        "with_optimizer(loss_fn, tx, microbatches=4)(carry, (x, y, key))",
        "step(carry, batch, key)",
        "step = with_optimizer(loss_fn, tx, microbatches=4)\nFIX",
    ),
    Case("value_and_grad(loss_fn, microbatches=0)", "value_and_grad(loss_fn, microbatches=4)"),
    Case(
        "tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)\nstep = with_optimizer(loss_fn, tx)\n"
        "step(init_carry(params, state, tx), batch)",
        "init_carry(optax.LookaheadParams.init_synced(params), state, tx)",
        "step(FIX, batch)",
    ),
    # with_ema, scan_steps, stack_batches, jit_step
    Case(
        "step = with_ema(step, decay=0.9)\nstep(carry, batch)",
        "carry._replace(state={**carry.state, 'ema': jax.tree.map(jnp.copy, carry.params)})",
        "step(FIX, batch)",
    ),
    Case(
        "step, carry = with_ema(step, decay=0.9), init_carry(params, state | {'ema': {'codes': x}}, tx)\n"
        "step(carry, batch)",
        "carry._replace(state={**carry.state, 'ema': jax.tree.map(jnp.copy, carry.params)})",
        "step(FIX, batch)",
    ),
    Case("with_ema(step, decay=99)", "with_ema(step, decay=0.999)"),
    Case(
        "loader, step = [batch] * 20, scan_steps(step)\nstep(carry, {'x': x, 'n': 1.0})",
        "for batches in stack_batches(loader, 10): carry, outs = step(carry, batches)",
    ),
    Case("batches = [batch] * 8\nstack_batches(batches, size=0)", "stack_batches(batches, size=4)"),
    Case("jit_step(step, like=jax.device_get(carry))", "jit_step(step, like=init_carry(params, state, tx))"),
    # assert_max_traces
    Case(
        "params, state, batch = {'w': jnp.ones(3)}, {'s': {'mean': jnp.zeros(3)}}, x\n"
        "def loss_fn(params, state, batch):\n"
        "    mean = state['s']['mean'] + batch.mean(0, keepdims=True)\n"
        "    return params['w'].sum(), {'s': {'mean': mean}}\n"
        "def run(state):\n"
        "    step = jax.jit(assert_max_traces(lambda state, batch: loss_fn(params, state, batch)[1]))\n"
        "    return step(step(state, batch), batch)\n"
        "run(state)",
        "state = settle_state(loss_fn, params, state, batch)",
        "FIX\nrun(state)",
    ),
    Case(
        "dtype = jnp.float32\n" + retraced("x, y", "x, y.astype(jnp.bfloat16)"),
        "jnp.asarray(value, dtype)",
        "value = y.astype(jnp.bfloat16)\nstep(x, FIX)",
    ),
    Case(
        "dtype = jnp.float32\n" + retraced("{'scale': jnp.float32(1)}, x", "{'scale': 1.0}, x"),
        "jnp.asarray(value, dtype)",
        "value = 1.0\nstep({'scale': FIX}, x)",
    ),
    Case(
        "step = assert_max_traces(step)\njax.jit(lambda carry: step(carry, batch))(carry)\n"
        "jax.jit(lambda carry: step(carry, batch))(carry)",
        "step = jit_step(...)",
        "step, carry = with_optimizer(loss_fn, tx), jax.tree.map(jnp.copy, carry)\n"
        "FIX\nfor _ in range(3):\n    carry, _ = step(carry, batch)",
        "assert_max_traces(step)",
    ),
    Case(
        "original = step\nstep = assert_max_traces(jax.jit(step))\nstep(carry, batch)\nstep(carry, batch)",
        "step = jit_step(assert_max_traces(step))",
        "step, carry = original, jax.tree.map(jnp.copy, carry)\n"
        "FIX\nfor _ in range(3):\n    carry, _ = step(carry, batch)",
    ),
    Case(
        "for _ in range(3):\n    jax.jit(assert_max_traces(with_optimizer(loss_fn, tx)))(carry, batch)",
        "step = jit_step(...)",
        "\n\n\ncarry = jax.tree.map(jnp.copy, carry)\nFIX\nfor _ in range(3):\n    carry, _ = step(carry, batch)",
        "assert_max_traces(with_optimizer(loss_fn, tx))",
    ),
    Case("explain_step(3, carry, batch)", "explain_step(step, carry, batch)", "FIX.to_dict()"),
    # what a loss lost, and what it was given twice
    Case(
        losing("loss, state"),
        "out, state = fn(params, state, x); return loss, state",
        "def fixed(params, state, batch):\n"
        "    x, loss = batch[0], params['head']['bias'].sum()\n"
        "    FIX\n"
        "with_optimizer(fixed, tx)(carry, batch)",
    ),
    Case(
        "def forked(params, state, batch):\n"
        "    one, _ = fn(params, state, batch[0])\n"
        "    two, new_state = fn(params, state, batch[0])\n"
        "    return (one + two).mean(), new_state\n"
        "with_optimizer(forked, tx)(carry, batch)",
        "first, state = fn(params, state, x); second, state = fn(params, state, y)",
        "def fixed(params, state, batch):\n"
        "    x = y = batch[0]\n"
        "    FIX\n"
        "    return (first + second).mean(), state\n"
        "with_optimizer(fixed, tx)(carry, batch)",
    ),
    Case(
        DROPS + "fn = with_mutable(dropping.apply)\n"
        "def reused(params, state, batch):\n"
        "    one, state = fn(params, state, batch[0], rngs={'dropout': key})\n"
        "    two, state = fn(params, state, batch[0], rngs={'dropout': key})\n"
        "    return (one + two).mean(), state\n"
        "with_optimizer(reused, tx)(init_carry(params, state, tx), batch)",
        "with_rngs(fn)",
        "def fixed(params, state, batch):\n"
        "    one, state = FIX(params, state, batch[0])\n"
        "    two, state = FIX(params, state, batch[0])\n"
        "    return (one + two).mean(), state\n"
        "with_optimizer(fixed, tx)(init_carry(params, state | rng_state(dropout=key), tx), batch)",
    ),
    Case(
        "outer = params\n"
        "def closed(params, state, batch):\n"
        "    out, state = fn(outer, state, batch[0])\n"
        "    return out.mean(), state\n"
        "with_optimizer(closed, tx)(carry, batch)",
        "def loss_fn(params, state, batch): out, state = fn(params, state, batch); ...",
        "batch = x\nFIX\nwith_optimizer(loss_fn, tx)(carry, batch)",
        "return out.mean(), state",
    ),
    Case(
        "carry = init_carry(params, state | {'ema': params}, tx)\nstep(carry, batch)",
        "with_ema(with_optimizer(loss_fn, tx), decay=0.999)",
        "FIX(carry, batch)",
    ),
    # the open step, and other carries
    Case(
        "tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())\n"
        "carry = init_carry(params, state, tx)\n"
        "(loss, grads), new_state = value_and_grad(loss_fn)(params, state, batch)\n"
        "apply_gradients(tx, carry, grads, new_state)",
        ("apply_gradients(tx, carry, grads, new_state, value=loss)", "with_optimizer(loss_fn, tx)"),
        "FIX0\nFIX1(carry, batch)",
    ),
    Case(
        "def loss(params, state, x, y):\n"
        "    return loss_fn_of_both(params, state, (x, y))\n"
        "loss_fn_of_both = loss_fn\n"
        "with_optimizer(loss, tx, microbatches=2)(carry, x, y)",
        ("def loss_fn(params, state, batch): x, y = batch; ...", "step(carry, (x, y))"),
        "FIX0\nstep = with_optimizer(loss_fn, tx, microbatches=2)\nFIX1",
        "return loss(params, state, x, y)",
    ),
    Case("grad_fn = value_and_grad(loss_fn)\ngrad_fn(carry, batch)", "grad_fn(carry.params, carry.state, batch)"),
    Case(
        "carry, grads = init_carry({'w': jnp.ones(3, jnp.bfloat16)}, {}, tx), {'w': jnp.ones(3)}\n"
        "apply_gradients(tx, carry, grads, {})",
        "grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, carry.params)",
        "FIX\napply_gradients(tx, carry, grads, {})",
    ),
    Case("init_carry(params, None, tx)", "init_carry(params, {}, tx)"),
    Case(
        losing("loss, flax.core.freeze(new_state)"),
        "return loss, flax.core.unfreeze(new_state)",
        in_loss().replace("    aux = out", "    aux, new_state = out, flax.core.freeze(new_state)"),
    ),
    Case(
        "from flax.training.train_state import TrainState\n"
        "state = TrainState.create(apply_fn=None, params={'w': jnp.ones(3)}, tx=tx)\n"
        "loss_fn = lambda params, state, batch: (params['w'].sum(), state)\n"
        "with_optimizer(loss_fn, tx)(state, batch)",
        ("state.apply_gradients(grads=grads)", "carry = adopt_carry(state, init_carry(state.params, {}, state.tx))"),
        "grads = {'w': jnp.ones(3)}\nFIX0\nFIX1\nwith_optimizer(loss_fn, tx)(carry, batch)",
    ),
    Case(
        "step = jit_step(step, batch=jax.sharding.SingleDeviceSharding(jax.devices()[0]), donate=False)\n"
        "step(carry, batch=batch)",
        "step(carry, batch)",
    ),
    # from_nnx, to_nnx
    Case(
        "class MLP(nnx.Module):\n"
        "    def __init__(self, rngs=None):\n"
        "        self.inner = nnx.Linear(3, 2, rngs=rngs or nnx.Rngs(0))\n"
        "from_nnx(MLP)",
        "MLP(...)",
        "from_nnx(FIX)",
        "rngs=None",
    ),
    Case(
        "module = nn.Dense(2)\nfrom_nnx(module)",
        ("with_mutable(module)", "nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=rngs), x)"),
        "rngs = nnx.Rngs(0)\nFIX0\nfrom_nnx(FIX1)",
    ),
    Case(
        "graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))\nfrom_nnx(state)",
        "from_nnx(nnx.merge(graphdef, state))",
    ),
    Case(
        "Model = lambda rngs: nnx.Linear(2, 3, rngs=rngs)\n"
        "module = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))\n"
        "from_nnx(module)",
        ("from_nnx(Model(..., rngs=nnx.Rngs(0)))", "nnx.update(module, state)"),
        "FIX0\nstate = nnx.state(Model(nnx.Rngs(0)))\nFIX1\nfrom_nnx(module)",
        "*()",
    ),
    Case(
        "model = nn.Dense(2)\nfrom_nnx(nnx.bridge.ToNNX(model))",
        "from_nnx(nnx.bridge.lazy_init(nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)), x))",
    ),
    Case(
        "module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))\nfrom_nnx(module, trainable=nnx.LoRAParam)",
        "from_nnx(module, trainable=nnx.Param)",
    ),
    Case(
        "class Calls(nnx.Variable):\n"
        "    pass\n"
        "class Counts(nnx.Module):\n"
        "    def __init__(self):\n"
        "        self.w, self.calls = nnx.Param(jnp.ones(3)), Calls(jnp.int32(0))\n"
        "module = Counts()\n"
        "from_nnx(module, trainable=(nnx.Param, Calls))",
        "trainable=nnx.All(nnx.Param, ...)",
        "from_nnx(module, FIX)",
        "nnx.Param",
    ),
    Case(
        "class Sows(nnx.Module):\n"
        "    def __init__(self):\n"
        "        self.w = nnx.Param(jnp.ones(3))\n"
        "    def __call__(self, x):\n"
        "        self.sow(nnx.Intermediate, 'seen', x)\n"
        "        return x * self.w\n"
        "m = Sows()\n"
        "fn, params, state = from_nnx(m)\n"
        "fn(params, state, jnp.ones(3))",
        "from_nnx(m, method=lambda m, x: (m(x), nnx.pop(m, nnx.Intermediate)))",
        "fn, params, state = FIX\nfn(params, state, jnp.ones(3))",
    ),
    Case(
        "class Counts(nnx.Module):\n"
        "    def __init__(self, calls=0):\n"
        "        self.calls = calls\n"
        "    def __call__(self, x):\n"
        "        self.calls = self.calls + 1\n"
        "        return x\n"
        "fn, params, state = from_nnx(Counts())\n"
        "fn(params, state, x)",
        "nnx.Variable(jnp.zeros((), jnp.int32))",
        "class Kept(nnx.Module):\n"
        "    def __init__(self):\n"
        "        self.calls = FIX\n"
        "    def __call__(self, x):\n"
        "        nnx.update(self, jax.tree.map(lambda leaf: leaf + 1, nnx.state(self)))\n"
        "        return x\n"
        "fn, params, state = from_nnx(Kept())\n"
        "assert int(jax.tree.leaves(fn(params, state, x)[1])[0]) == 1",
    ),
    Case(
        "class Pool(nnx.Module):\n"
        "    def __call__(self, x):\n"
        "        return x.mean()\n"
        "module = Pool()\n"
        "from_nnx(module, trainable=nnx.BatchStat)",
        "from_nnx(module)",
    ),
    Case(
        "module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))\nto_nnx(module, {'w': x}, {})",
        "fn, params, state = from_nnx(module)",
        "FIX\nto_nnx(module, params, state)",
    ),
    # what no other test has as a whole message
    Case(
        "start = jax.tree.map(jnp.copy, carry)\njit_step(step)(start, batch)\nadopt_carry(start, start)",
        "jax.tree.map(jnp.copy, carry)",
        "carry = init_carry(*split_params(module.init(key, x)), tx)\nkept, _ = FIX, jit_step(step)(carry, batch)\n"
        "adopt_carry(kept, kept)",
    ),
    Case(
        "restored, like = carry, init_carry(params, state | {'ema': params}, tx)\nadopt_carry(restored, like)",
        "carry = adopt_carry(restored, like, strict=False)",
    ),
    Case(
        "like, path = carry, 'checkpoints/1'\nadopt_carry(path, like)",
        "adopt_carry(checkpointer.restore(path), like)",
        "class checkpointer:\n    restore = staticmethod(lambda path: like)\nFIX",
    ),
    Case("like, restored = carry, [carry, 3]\nadopt_carry(restored, like)", "adopt_carry(restored[0], like)"),
    Case("like, restored = carry, tuple(carry)\nadopt_carry(restored, like)", "adopt_carry(Carry(*restored), like)"),
    Case(
        "restored = jax.tree.map(lambda leaf: leaf.astype('bfloat16') if leaf.dtype == 'float32' else leaf, carry)\n"
        "adopt_carry(restored, carry)",
        "restored = jax.tree.map(lambda leaf: leaf.astype('float32') if leaf.dtype == 'bfloat16' else leaf, restored)",
        "FIX\nadopt_carry(restored, carry)",
    ),
    Case(
        "restored = init_carry(params, state, optax.sgd(0.1))\n"
        "like = init_carry(params, state, optax.sgd(lambda count: 0.1))\nadopt_carry(restored, like)",
        (
            "carry = adopt_carry(restored, like, strict=False)",
            "carry = adopt_carry(carry._replace(opt_state=optax.tree_utils.tree_set(carry.opt_state, "
            "count=carry.step)), like)",
        ),
        "FIX0\nFIX1",
    ),
    Case(
        "module = nnx.Linear(3, 1, rngs=nnx.Rngs(0))\noptimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)\n"
        "like = init_carry(*from_nnx(module)[1:], tx)\nadopt_carry(nnx.state(optimizer), like)",
        "_, params, state = from_nnx(module); saved = nnx.state(optimizer); carry = adopt_carry({'step': "
        "saved['step'], 'params': params, 'state': state, 'opt_state': saved['opt_state']}, like)",
    ),
    Case(
        "init_carry(params, state, tx, sharding=jax.sharding.PartitionSpec())",
        "init_carry(params, state, tx, sharding=NamedSharding(mesh, PartitionSpec()))",
        MESH,
    ),
    Case(
        "labels, transforms = flax.core.freeze(jax.tree.map(lambda _: 'all', params)), {'all': tx}\n"
        "init_carry(params, state, optax.multi_transform(transforms, labels))",
        ("flax.core.unfreeze(labels)", "optax.multi_transform(transforms, labels)"),
        "labels = FIX0\ninit_carry(params, state, FIX1)",
    ),
    Case("init_carry(params, state, 3)", ("init_carry(params, state, tx)", "tx = optax.adam(1e-3)"), "FIX1\nFIX0"),
    Case(
        "scan_steps(lambda carry, batch: (batch, carry))(carry, (x, y))",
        "return carry, out",
        "def fixed(carry, batch):\n    out = 0.0\n    FIX\nscan_steps(fixed)(carry, (x, y))",
    ),
    Case(
        "def step(params, state, batch):\n    return params, state, 0.0\nexplain_step(step, (params, state), batch)",
        "def as_step(carry, batch): *new, out = step(*carry, batch); return tuple(new), out",
        "FIX\nexplain_step(as_step, (params, state), batch)",
    ),
    Case("value_and_grad(loss_fn, overwrite=3)", "value_and_grad(loss_fn, overwrite='fp8_metas')"),
    Case(
        "closed = lambda params, state, batch: loss_fn(params, state, (x, y))\n"
        "with_optimizer(closed, tx, microbatches=2)(carry, ())",
        "microbatches=1",
        "with_optimizer(closed, tx, FIX)(carry, ())",
    ),
    Case(
        "wrong = jax.value_and_grad(lambda params, state, batch: loss_fn(params, state, batch)[0])\n"
        "value_and_grad(wrong)(params, state, batch)",
        "value_and_grad(loss_fn)",
        "FIX(params, state, batch)",
    ),
    Case("skip_nonfinite(3)", "skip_nonfinite(with_optimizer(loss_fn, tx))", "FIX(carry, batch)"),
    Case(
        "skip_nonfinite(step, moving=3)",
        "skip_nonfinite(step, moving='state/extra/scale/*')",
        "FIX(init_carry(params, state | {'extra': {'scale': {'now': 1.0}}}, tx), batch)",
    ),
    Case(
        "skip_nonfinite(step, moving='zzzzzzzzzzz')(carry, batch)",
        "moving='state/extra/*'",
        "skip_nonfinite(step, FIX)(init_carry(params, state | {'extra': {'scale': 1.0}}, tx), batch)",
    ),
    Case(
        "with_ema(step, decay=0.9, of=3)",
        "with_ema(step, decay=0.999, of=lambda carry: carry.params)",
        "FIX(init_carry(params, state | {'ema': params}, tx), batch)",
    ),
    Case(
        "carry = init_carry(params, state | {'ema': {'head': params['head']}}, tx)\n"
        "with_ema(step, decay=0.9)(carry, batch)",
        "adopt_carry(carry, init_carry(carry.params, {**carry.state, 'ema': carry.params}, tx), strict=False)",
        "with_ema(step, decay=0.9)(FIX, batch)",
    ),
    Case("vmap_stateful(3)", "vmap_stateful(with_mutable(model))", "model = synced\nFIX"),
    Case("vmap_stateful(fn, split_rngs=3)", "vmap_stateful(fn, split_rngs={'dropout': True})"),
    Case("scan_steps(3)", "scan_steps(with_optimizer(loss_fn, tx))", "FIX(carry, (x[None], y[None]))"),
    Case(
        "loader = [{'x': x, 'y': y, 'name': 'a'}]\n[*stack_batches(loader, 10)]",
        "stack_batches(({'x': b['x'], 'y': b['y']} for b in loader), 10)",
        "[*FIX]",
    ),
    Case("jit_step(3)", "jit_step(with_optimizer(loss_fn, tx))"),
    Case(
        "jit_step(step, batch=3)",
        "jit_step(step, like=carry, batch=NamedSharding(mesh, PartitionSpec('data')))",
        MESH,
    ),
    Case(
        "module = nnx.Linear(3, 1, rngs=nnx.Rngs(0))\nfrom_nnx(module, method=3)",
        "from_nnx(module, method=Model.decode)",
        "class Model(nnx.Linear):\n    def decode(self, x): return self(x)\n"
        "module = Model(3, 1, rngs=nnx.Rngs(0))\nFIX",
    ),
    Case(
        "carry = init_carry(*jax.tree.map(jnp.copy, (params, state | {'ema': params})), tx)\n"
        "with_ema(jit_step(step), decay=0.9)(carry, batch)",
        "jit_step(with_ema(step, decay=0.999))",
        "carry = init_carry(*jax.tree.map(jnp.copy, (params, state | {'ema': params})), tx)\nFIX(carry, batch)",
    ),
    Case("settle_state(3, params, state, x)", "settle_state(with_mutable(model), params, state, x)"),
    Case("fn(params, state['batch_stats'], x)", "fn(params, {'batch_stats': ...}, x)", "FIX", "state['batch_stats']"),
    Case(
        "counted = jax.jit(assert_max_traces(step))\ncounted(carry, batch)\n"
        "other = init_carry(*split_params(variables, trainable='head/*'), tx)\ncounted(other, batch)",
        "jit_step(assert_max_traces(step))",
        "FIX(jax.tree.map(jnp.copy, other), batch)",
    ),
    Case(
        "with_mutable(model, mutable=['rngs'])(params, state | rng_state(dropout=key), x)",
        "with_mutable(fn)",
        "fn = model.apply\nFIX(params, state | rng_state(dropout=key), x)",
    ),
    Case(
        "model, tx = nn.Dense(1), optax.contrib.differentially_private_aggregate(1.0, 0.1, 0)\n"
        "def loss_fn(params, state, batch):\n"
        "    out, state = with_mutable(model)(params, state, batch[0])\n"
        "    return ((out - batch[1]) ** 2).mean(), state\n"
        "carry = init_carry(*split_params(model.init(key, x)), tx)\n"
        "with_optimizer(loss_fn, tx)(carry, batch)",
        "(loss, grads), state = vmap_stateful(value_and_grad(loss_fn))(carry.params, carry.state, batch); "
        "carry = apply_gradients(tx, carry, grads, state)",
    ),
)

WORDS = {
    "carry = jax.device_put(carry, NamedSharding(mesh, PartitionSpec()))": "on eight devices: test_mesh runs it",
    "carry = adopt_carry(carry, like)": "on eight devices: test_mesh runs it",
    "state_axes={'_': 0} and a state with that axis; to join them, jax.tree.map(lambda leaf: leaf.max(0), new_state[": (
        "of fp8 layers: test_overwrite runs both"
    ),
    "jax.pmap(assert_max_traces(step, max_traces=2), ...); or jax.jit over a mesh, which traces once": (
        "on two devices: test_pmap runs it"
    ),
    "the same jax.random.key(seed) in every process; their batches may differ": "of several processes: test_processes",
    "drop or pad the last batch; pass what is shared after the batch, or give it a sharding of its own in a tree": (
        "words: which one, the user knows"
    ),
    "another name for the model's own collection: self.variable('averages', ...)": "words: the name is the user's own",
    "fn(variables, *args, mutable=[...]) -> (out, updated)": "the form of a function of the user's own",
    "fn(params, state, ...) -> (out, new_state)": "the form of a function of the user's own",
    "step(carry, batch) -> (carry, out)": "the form of a function of the user's own",
    "def loss_fn(params, state, batch): ...; return loss, new_state": "the form of a function of the user's own",
    "make fn return every state leaf in the shape and dtype that it was given": "words: the body is the user's own",
    "keep what does not change in the closure of the step; for an abstract carry, jax.eval_shape of init_carry": (
        "words: what does not change, the user knows"
    ),
    "jax.config.update('jax_enable_x64', True), or a count in another unit": "for the whole process: `make flags`",
    "return arrays and numbers alone; what does not change belongs outside the step": "words",
    "drop or pad the ragged last batch; or a higher max_traces, if each is meant": "words: which one, the user knows",
    "state = settle_state(loss_fn, params, state, batch) before init_carry; drop or pad the ragged last batch; or a "
    "higher max_traces, if each is meant": "two fixes, of which the first is typed alone",
    "keep the structure, and make static values, tx and functions once, outside the loop; or a higher max_traces, "
    "if each is meant": "words: what changed is the user's own",
    "jit_step(step, like=carry), and every batch put on the mesh alike; or a higher max_traces, if each is meant": (
        "test_mesh: test_one_compile_for_every_placement"
    ),
    "jax.lax.pmean(value, '_') there, or state_axes={'_': 0, '_': 0} and a state with that axis": (
        "test_messages: test_only_the_layers_at_fault_are_named runs it"
    ),
    "first = jax.eval_shape(tx.update, carry.params, carry.opt_state, carry.params)[1]; carry = adopt_carry(carry, "
    "carry._replace(opt_state=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, "
    "device=carry.step.sharding), first)), strict=False)": "test_optimizers runs it, where optax has monitor",
    "(loss, grads), state = value_and_grad(loss_fn)(carry.params, carry.state, batch)": (
        "test_overwrite trains its fp8 layers so"
    ),
    "as many rows as a multiple of 8 times the size of those axes, or fewer microbatches": "words: rows are the user's",
    "fn(params, state, x, train=True), handed on to each layer. Where they are to stay as they are: "
    "split_params(variables, trainable=...) that freezes them, or with_mutable(fn, mutable=": (
        "the model is the user's own; test_untouched has both ways"
    ),
    "for a kernel, from_nnx(module, method=call), with def call(m, x): before = jax.tree.map(lambda leaf: leaf, "
    "nnx.state(m, nnx.Param)); out = m(x); nnx.update(m, before); return out. For an average, "
    "trainable=nnx.All(nnx.Param, lambda path, _: '/'.join(map(str, path)) not in": "test_nnx runs both",
    "jax.shard_map(step, mesh=mesh, ...) over a mesh with that axis; or no axis_name": "test_mesh runs it",
    "jit_step(step, like=carry), where the step returns (carry, out)": "the form of a function of the user's own",
    "nn.BatchNorm(..., axis_name='_'); or jax.lax.pmean(leaf, '_') in loss_fn": "test_sharding runs it",
    "the arrays that are declared; or in the annotation another name, where sizes may differ": "words",
    "with nnx.var_defaults(ref=False, hijax=False): module = Model(..., rngs=nnx.Rngs(0))": "of a later Flax: test_nnx",
    "with_optimizer(jax.sharding.auto_axes(loss_fn, out_sharding=NamedSharding(mesh, PartitionSpec())), tx); "
    "or jax.make_mesh(..., axis_types=(AxisType.Auto,))": (
        "test_mesh wraps each loss so on Explicit axes"
    ),
}
"""Fixes that are no code to be typed, or that another test types."""


OURS = (
    *(fs.CollectionError, fs.SignatureError, fs.StateDriftError, fs.UnsyncedStateError),
    *(fs.RetraceError, fs.RetraceWarning, fs.UntouchedStateWarning, fs.DroppedStateWarning),
)


@functools.cache
def names() -> dict[str, Any]:
    """What a program begins with; made once, since nothing mutates it."""
    made: dict[str, Any] = {"__name__": "program"}
    exec(START, made)  # noqa: S102 (our own code)
    return made


def compiled(case: Case, text: str) -> Any:
    """The lines of each case are its own: a step that the same line makes anew would be told."""
    return compile(text, f"case {CASES.index(case)}", "exec")


@functools.cache
def printed(case: Case) -> tuple[str, dict[str, Any]]:
    """The fix that the mistake ends in, and the names that are there then."""
    there = dict(names())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # Flax's own, of what it will drop
        try:
            exec(compiled(case, case.wrong), there)  # noqa: S102 (our own code)
        except OURS as error:
            return error.fix, there
    pytest.fail("the mistake is none")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.wrong.strip().splitlines()[-1][:60])
def test_the_fix_as_printed_works(case: Case) -> None:
    fix, there = printed(case)
    for part in [case.typed] if isinstance(case.typed, str) else case.typed:
        assert part in fix
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # Flax's own, of what it will drop
        exec(compiled(case, case.program()), dict(there))  # noqa: S102 (our own code)


# Every fix that the package can print, from the source of its rows


ROWS = {"Refusal", "form", "function", "_misreturned", *(each.__name__ for each in OURS)}
"""Calls whose last argument is a fix."""


def fixes_in(tree: ast.AST) -> Iterator[ast.expr]:
    """Where a row has its fix; the form of a function is one too, of whatever returned something else."""
    yield ast.Name("FORM")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (each.value for each in node.keywords if each.arg == "fix")
            called = getattr(node.func, "id", "")
            yield from node.args[-1:] if called in ROWS else ()


def values_in(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What each name of a module may stand for; of a function, what it returns last."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        pairs: list[tuple[Any, Any]] = []
        if isinstance(node, ast.Assign | ast.AugAssign):
            pairs = [(each, node.value) for each in getattr(node, "targets", [getattr(node, "target", None)])]
        elif isinstance(node, ast.FunctionDef):
            returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return)]
            pairs = [(ast.Name(node.name), each.elts[-1] if isinstance(each, ast.Tuple) else each) for each in returned]
        for target, value in pairs:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            expressions = value.elts if isinstance(value, ast.Tuple) and len(names) > 1 else [value] * len(names)
            for name, expression in zip(names, expressions, strict=True):
                found.setdefault(getattr(name, "id", ""), []).append(expression)
    return found


def literals(node: ast.AST | None, values: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The texts that an expression may come to, cut where a value stands in between."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from re.split(r"\$\w+", node.value)
    elif isinstance(node, ast.Name):
        rest = {name: each for name, each in values.items() if name != node.id}
        for value in values.get(node.id, []):
            yield from literals(value, rest)
    elif isinstance(node, ast.Call):
        yield from literals(node.func, values)
    elif isinstance(node, ast.IfExp | ast.BinOp | ast.BoolOp | ast.JoinedStr | ast.FormattedValue | ast.Starred):
        for each in ast.iter_child_nodes(node):
            yield from literals(each, values) if each is not getattr(node, "test", None) else ()


def test_every_fix_is_typed_or_is_words() -> None:
    """Each text of a fix is part of one that a case above prints, or of `WORDS`, and these hold nothing else."""
    rows = ast.parse("\n".join(path.read_text() for path in pathlib.Path(_refusals.__file__).parent.glob("*.py")))
    values = values_in(rows)
    texts = {text.strip() for fix in fixes_in(rows) for text in literals(fix, values)}
    pieces = {text for text in texts if len(text) > 7}
    assert len(pieces) > 200
    known = [*(printed(case)[0] for case in CASES), *WORDS]
    assert sorted(piece for piece in pieces if not any(piece in fix for fix in known)) == []
    assert [each for each in WORDS if not any(piece in each for piece in pieces)] == []
