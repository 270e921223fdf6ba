"""Read by mypy and pyright, not run: a model's own signature goes through every combinator."""

import functools
from typing import Any, assert_type

import flax.linen as nn
import jax
import optax
from flax import nnx
from jax import Array

import flaxsplit as fs


class Model(nn.Module):
    """Positional, keyword-only and default arguments."""

    def __call__(self, x: Array, train: bool = False, *, scale: float = 1.0) -> Array:
        return x

    def encode(self, x: Array, depth: int) -> tuple[Array, Array]:
        return x, x


model = Model()
variables: dict[str, Any] = {}
x: Array = jax.numpy.ones(3)
params, state = fs.split_params(variables, trainable="head/*")
assert_type(params, dict[str, Any])
assert_type(fs.merge_state(params, state), dict[str, Any])

apply = fs.with_mutable(model)
assert_type(apply(params, state, x), tuple[Array, dict[str, Any]])
assert_type(apply(params, state, x, True, scale=2.0), tuple[Array, dict[str, Any]])
assert_type(fs.with_mutable(model, method=Model.encode)(params, state, x, 3)[0], tuple[Array, Array])
assert_type(fs.with_mutable(model, capture="intermediates")(params, state, x)[0], tuple[Array, dict[str, Any]])
assert_type(fs.with_mutable(model.apply)(params, state, x)[0], Any)
assert_type(fs.with_mutable(functools.partial(model.apply, train=True))(params, state, x)[0], Any)


class Net(nnx.Module):
    """The same in NNX."""

    def __call__(self, x: Array, *, scale: float = 1.0) -> Array:
        return x

    def encode(self, x: Array, depth: int) -> tuple[Array, Array]:
        return x, x


def last(net: Net, x: Array) -> int:
    return 0


net = Net()
fn, net_params, net_state = fs.from_nnx(net, trainable=nnx.All(nnx.Param, nnx.PathContains("head")))
assert_type(fn(net_params, net_state, x, scale=2.0), tuple[Array, dict[str, Any]])
assert_type(net_params, dict[str, Any])
assert_type(fs.from_nnx(net, trainable=nnx.LoRAParam)[2], dict[str, Any])
assert_type(fs.from_nnx(net, trainable=["head/*", nnx.Param])[0](net_params, net_state, x)[0], Array)
assert_type(fs.from_nnx(net, trainable=lambda path, variable: path[0] == "head")[0](net_params, net_state, x)[0], Array)
assert_type(fs.from_nnx(net, method=Net.encode)[0](net_params, net_state, x, 3)[0], tuple[Array, Array])
assert_type(fs.from_nnx(net, method=last)[0](net_params, net_state, x)[0], int)
assert_type(fs.to_nnx(net, net_params, net_state), Net)
assert_type(fs.vmap_stateful(fn)(net_params, net_state, x)[0], Array)
fn(net_params, net_state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
fn(net_params, net_state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
fs.from_nnx(Net)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
fs.from_nnx(model)  # pyright: ignore[reportArgumentType]

stacked = fs.with_rngs(fs.vmap_stateful(fs.with_mutable(model, mutable=False), axis_name="batch"))
assert_type(stacked(params, state | fs.rng_state(dropout=jax.random.key(0)), x, train=True)[0], Array)

apply(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
apply(params, state, "x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
apply(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
apply(params, state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
stacked(params, state, x, 1.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
fs.with_mutable(Model)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
fs.split_params(variables, "head/*")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def loss_fn(params: dict[str, Any], state: dict[str, Any], batch: tuple[Array, Array]) -> tuple[Array, dict[str, Any]]:
    pred, state = stacked(params, state, batch[0])
    return optax.l2_loss(pred, batch[1]).mean(), state


def with_aux(params: Any, state: Any, batch: Array) -> tuple[tuple[Array, int], dict[str, Any]]:
    return (batch, 1), state


tx = optax.adam(1e-3)
carry = fs.init_carry(params, state, tx)
step = fs.with_optimizer(loss_fn, tx)
assert_type(step(carry, (x, x)), tuple[fs.Carry, Array])
assert_type(fs.with_optimizer(with_aux, tx, has_aux=True)(carry, x), tuple[fs.Carry, tuple[Array, int]])

jitted = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_ema(step, decay=0.9))))
assert_type(jitted(carry, (x, x)), tuple[fs.Carry, Array])
assert_type(jitted.lower(carry, (x, x)), jax.stages.Lowered)
jitted(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
jitted(params, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
fs.with_optimizer(loss_fn, tx, has_aux=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]

for batches in fs.stack_batches([(x, x)], 10):
    assert_type(batches, tuple[Array, Array])
assert_type(fs.adopt_carry(object(), carry), fs.Carry)
assert_type(fs.settle_state(apply, params, state, x), dict[str, Any])
with fs.compile_log() as log:
    assert_type(log, fs.CompileLog)
    assert_type(log.traces["loss_fn"], int)
error: Exception
for error in (
    fs.CollectionError("", "", [], "", ""),
    fs.SignatureError("", "", [], "", ""),
    fs.StateDriftError("", "", [], "", ""),
    fs.UnsyncedStateError("", "", [], "", ""),
    fs.RetraceError("", "", [], "", ""),
    fs.UntouchedStateWarning("", "", [], "", ""),
):
    assert_type(error.leaves, tuple[str, ...])
