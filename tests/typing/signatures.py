"""Read by mypy and pyright, not run: a model's own signature goes through every combinator."""

import functools
from collections.abc import Sequence
from typing import Any, assert_type

import flax.linen as nn
import jax
import optax
from flax import nnx
from jax import Array

import flaxsplit as fs
from tests.typing.models import Coder, Tagger


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
assert_type(fs.with_mutable(model.apply)(params, state, x, rngs={"dropout": x}), tuple[Any, dict[str, Any]])
assert_type(fs.with_mutable(functools.partial(model.apply, train=True))(params, state, x)[0], Any)


def plain(variables: dict[str, Any], x: Array, train: bool = False, mutable: Any = False) -> Any:
    return model.apply(variables, x, train, mutable=mutable)


assert_type(fs.with_mutable(plain)(params, state, x, train=True), tuple[Any, dict[str, Any]])
assert_type(fs.with_mutable(jax.jit(model.apply))(params, state, x)[0], Any)
fs.with_mutable(plain, mutable=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
fs.with_mutable(3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


# Flax's own models, of which some have overloads without the overlay, and any collection of names.
of_rnn, of_attention = fs.with_mutable(nn.RNN(nn.LSTMCell(4))), fs.with_mutable(nn.MultiHeadDotProductAttention(2))
assert_type(of_rnn(params, state, x, return_carry=True), tuple[Any, dict[str, Any]])
assert_type(of_attention(params, state, x, inputs_kv=x), tuple[Array, dict[str, Any]])
assert_type(fs.with_mutable(model, capture={"losses"})(params, state, x)[0], tuple[Array, dict[str, Any]])
of_rnn(params, state, x, return_carries=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


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
anything: Any = net
of_anything, _, _ = fs.from_nnx(anything)
assert_type(of_anything(net_params, net_state, x, whatever=x), tuple[Any, dict[str, Any]])
assert_type(fs.with_mutable(anything)(params, state, x, whatever=x), tuple[Any, dict[str, Any]])
assert_type(fs.from_nnx(net, trainable=nnx.LoRAParam)[2], dict[str, Any])
assert_type(fs.from_nnx(net, trainable=["head/*", nnx.Param])[0](net_params, net_state, x)[0], Array)
assert_type(fs.from_nnx(net, trainable=lambda path, variable: path[0] == "head")[0](net_params, net_state, x)[0], Array)
assert_type(fs.from_nnx(net, method=Net.encode)[0](net_params, net_state, x, 3)[0], tuple[Array, Array])
assert_type(fs.from_nnx(net, method=net.encode)[0](net_params, net_state, x, depth=3)[0], tuple[Array, Array])
assert_type(fs.from_nnx(net, method=last)[0](net_params, net_state, x)[0], int)
assert_type(fs.to_nnx(net, net_params, net_state), Net)
assert_type(fs.vmap_stateful(fn)(net_params, net_state, x)[0], Array)
fn(net_params, net_state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
fn(net_params, net_state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
fs.from_nnx(Net)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
fs.from_nnx(model)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]

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
report = fs.explain_step(jitted, carry, (x, x))
assert_type(report, fs.StepReport)
assert_type(report.findings, tuple[fs.Finding, ...])
assert_type(report.compare(report), str)
fs.explain_step(lambda carry, batch: (carry, batch), {"w": x}, jax.ShapeDtypeStruct((2,), x.dtype), x, rate=0.1)
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
    fs.RetraceWarning("", "", [], "", ""),
    fs.UntouchedStateWarning("", "", [], "", ""),
    fs.DroppedStateWarning("", "", [], "", ""),
):
    assert_type(error.leaves, tuple[str, ...])


coder, tagger = Coder(), Tagger()
list_of_names: Sequence[str] = ["losses"]
tuple_of_names: tuple[str, ...] = ("losses",)


def arguments() -> None:
    """Positional, keyword-only and default ones, and the number of outputs."""
    assert_type(apply(params, state, x=x), tuple[Array, dict[str, Any]])
    assert_type(apply(params, state, x, train=True), tuple[Array, dict[str, Any]])
    assert_type(apply(params, state, scale=2.0, x=x), tuple[Array, dict[str, Any]])
    assert_type(fs.with_mutable(coder)(params, state, x, y=x)[0], tuple[Array, Array])
    (first, second), new_state = fs.with_mutable(coder, mutable=["batch_stats"])(params, state, x, x)
    assert_type(first, Array)
    assert_type(second, Array)
    assert_type(new_state, dict[str, Any])
    assert_type(functools.partial(apply, params, state)(x), tuple[Array, dict[str, Any]])
    assert_type(fs.with_mutable(tagger)(params, state, x, x > 0)[0], Array)
    fs.with_mutable(tagger)(params, state, x, "mask")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_mutable(coder)(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def methods() -> None:
    """A method of the class, bound to the module, or by its name, of which nothing is known."""
    of_class = fs.with_mutable(coder, method=Coder.encode)
    bound = fs.with_mutable(coder, method=coder.encode)
    of_apply = fs.with_mutable(coder.apply, method=Coder.encode)
    assert_type(of_class(params, state, x, depth=3)[0], Array)
    assert_type(bound(params, state, x, depth=3)[0], Array)
    assert_type(of_apply(params, state, x, depth=3)[0], Array)
    assert_type(fs.with_mutable(coder, method="encode")(params, state, x, 3)[0], Any)
    assert_type(fs.with_mutable(coder.apply, method="encode")(params, state, x, 3)[0], Any)
    bound(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    of_apply(params, state, x, "3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_mutable(coder, method=Model.encode)(params, state, x, 3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def captures() -> None:
    """The output is a pair only where sown collections are asked for."""
    assert_type(fs.with_mutable(coder, capture=())(params, state, x, x)[0], tuple[Array, Array])
    for sown in (fs.with_mutable(coder, capture="losses"), fs.with_mutable(coder, capture=("losses", "norms"))):
        assert_type(sown(params, state, x, x)[0], tuple[tuple[Array, Array], dict[str, Any]])
    for names in (list_of_names, tuple_of_names):
        assert_type(
            fs.with_mutable(coder, capture=names)(params, state, x, x)[0], tuple[tuple[Array, Array], dict[str, Any]]
        )
    of_class = fs.with_mutable(coder, method=Coder.encode, capture=["losses"])
    bound = fs.with_mutable(coder, method=coder.encode, capture=["losses"])
    assert_type(of_class(params, state, x, 3)[0], tuple[Array, dict[str, Any]])
    assert_type(bound(params, state, x, 3)[0], tuple[Array, dict[str, Any]])
    assert_type(fs.with_rngs(fs.vmap_stateful(of_class))(params, state, x, 3)[0], tuple[Array, dict[str, Any]])
    of_class(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def four_around_a_model() -> None:
    """In any order, and with a plain function among them."""
    inner = fs.assert_max_traces(fs.vmap_stateful(fs.with_rngs(fs.with_mutable(model)), axis_name="inner"))
    outer = fs.with_rngs(
        fs.vmap_stateful(fs.vmap_stateful(fs.with_mutable(coder), in_axes=(0, None)), axis_name="outer")
    )
    assert_type(inner(params, state, x, True, scale=2.0), tuple[Array, dict[str, Any]])
    assert_type(outer(params, state, x, x), tuple[tuple[Array, Array], dict[str, Any]])
    assert_type(fs.settle_state(outer, params, state, x, x), dict[str, Any])
    inner(params, state, x, training=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    inner(params, state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    outer(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.vmap_stateful(model)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.with_rngs(model)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


def settling() -> None:
    """The call is the function's own."""
    assert_type(fs.settle_state(apply, params, state, x, train=True), dict[str, Any])
    assert_type(fs.settle_state(by_hand, params, state, x), dict[str, Any])
    assert_type(fs.settle_state(apply, params, state, jax.ShapeDtypeStruct((3,), "float32"), True), dict[str, Any])
    fs.settle_state(apply, params, state)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fs.settle_state(apply, params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.settle_state(by_hand, params, state, "x")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def by_hand(params: dict[str, Any], state: dict[str, Any], x: Array) -> tuple[Array, dict[str, Any]]:
    return x, state
