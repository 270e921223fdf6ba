"""Read by type checkers, not run: functions of a user, annotated with the public names as docs/annotations.md does."""

from collections.abc import Callable
from typing import Any, NamedTuple, NewType, ParamSpec, Protocol, TypeVar, assert_type

import flax.linen as nn
import jax
import optax
from jax import Array

import flaxsplit as fs
from tests.typing.models import Classifier, Coder

P = ParamSpec("P")
R = TypeVar("R")
BatchT = TypeVar("BatchT")
OutT = TypeVar("OutT")
CarryT = TypeVar("CarryT")


class Batch(NamedTuple):
    x: Array
    y: Array


Model = fs.LinenModule[[Array], Array]
Step = fs.Step[Batch, Array]
Compiled = fs.JittedStep[[fs.Carry, Batch], tuple[fs.Carry, Array]]


def make_loss(model: Model) -> fs.LossFn[Batch, Array]:
    apply = fs.with_rngs(fs.with_mutable(model))

    def loss_fn(params: fs.Params, state: fs.State, batch: Batch) -> tuple[Array, fs.State]:
        pred, state = apply(params, state, batch.x)
        return optax.l2_loss(pred, batch.y).mean(), state

    return loss_fn


def make_gradient(loss_fn: fs.LossFn[Batch, Array]) -> fs.GradFn[Batch, Array]:
    return fs.value_and_grad(loss_fn, microbatches=2)


def make_step(model: Model, tx: optax.GradientTransformation) -> Step:
    return fs.with_ema(fs.with_optimizer(make_loss(model), tx), decay=0.99)


def make_compiled(model: Model, tx: optax.GradientTransformation) -> Compiled:
    return fs.jit_step(fs.assert_max_traces(make_step(model, tx)))


def make_open_step(loss_fn: fs.LossFn[Batch, Array], tx: optax.GradientTransformation) -> Step:
    grads_of = make_gradient(loss_fn)

    def step(carry: fs.Carry, batch: Batch) -> tuple[fs.Carry, Array]:
        (loss, grads), state = grads_of(carry.params, carry.state, batch)
        return fs.apply_gradients(tx, carry, grads, state, value=loss), loss

    return step


def in_bfloat16(fn: fs.Stateful[P, R]) -> fs.Stateful[P, R]:
    """Over any stateful function, whose signature it keeps."""

    def cast(params: Any, state: Any, /, *args: P.args, **kwargs: P.kwargs) -> tuple[R, fs.State]:
        return fn(jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params), state, *args, **kwargs)

    return cast


def twice(step: fs.Step[BatchT, OutT, P, CarryT]) -> fs.Step[BatchT, OutT, P, CarryT]:
    """Over any step."""

    def stepped(carry: CarryT, batch: BatchT, *args: P.args, **kwargs: P.kwargs) -> tuple[CarryT, OutT]:
        carry, _ = step(carry, batch, *args, **kwargs)
        return step(carry, batch, *args, **kwargs)

    return stepped


class Encoder(Protocol):
    """A model of one's own: what it is called with, and `apply`."""

    def __call__(self, x: Array, train: bool = False) -> Array: ...

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any: ...


def features(model: Encoder, variables: fs.Variables, x: Array, trainable: fs.Trainable) -> Array:
    params, state = fs.split_params(variables, trainable=trainable)
    assert_type(params, fs.Params)
    assert_type(state, fs.State)
    assert_type(fs.merge_state(params, state), fs.Variables)
    return fs.with_mutable(model, mutable=False)(params, state, x, train=False)[0]


def make_evaluation(model: Model) -> fs.JittedStep[[fs.Carry, Batch], Array]:
    """`jax.jit` forgets the types, and `jit_step` keeps them."""
    apply = fs.with_mutable(model, mutable=False)

    def evaluate(carry: fs.Carry, batch: Batch) -> Array:
        pred, _ = apply(carry.params, carry.state, batch.x)
        return optax.l2_loss(pred, batch.y).mean()

    return fs.jit_step(evaluate, donate=False)


class Fused(nn.Module):
    """No `Model`; a class of its own, since pyright, once it has refused a class here, refuses it everywhere."""

    def __call__(self, x: Array, y: Array) -> Array:
        return x + y


class Mine(NamedTuple):
    generator: fs.Carry
    critic: fs.Carry


Generator = NewType("Generator", fs.Carry)
Critic = NewType("Critic", fs.Carry)
Round = fs.JittedStep[[Generator, Critic, Batch], tuple[Generator, Critic]]


def make_round(generate: Step, judge: Step) -> Round:
    """Two carries that cannot be swapped."""

    def both(generator: Generator, critic: Critic, batch: Batch) -> tuple[Generator, Critic]:
        return Generator(generate(generator, batch)[0]), Critic(judge(critic, batch)[0])

    return fs.jit_step(both)


def adversarial(carry: Mine, batch: Batch) -> tuple[Mine, Array]:
    return carry, batch.x


def main(x: Array, tx: optax.GradientTransformation) -> None:
    model = Classifier()
    carry, batch = fs.init_carry({}, {}, tx), Batch(x, x)
    assert_type(make_loss(model), fs.LossFn[Batch, Array])
    (loss, grads), state = make_gradient(make_loss(model))(carry.params, carry.state, batch)
    assert_type(loss, Array)
    assert_type(grads, fs.Params)
    assert_type(state, fs.State)
    assert_type(make_step(model, tx)(carry, batch), tuple[fs.Carry, Array])
    assert_type(make_open_step(make_loss(model), tx)(carry=carry, batch=batch), tuple[fs.Carry, Array])
    assert_type(make_compiled(model, tx)(carry, batch), tuple[fs.Carry, Array])
    assert_type(make_compiled(model, tx).lower(carry, batch), jax.stages.Lowered)
    assert_type(make_evaluation(model)(carry, batch), Array)
    assert_type(features(model, {}, x, "head/*"), Array)
    features(model, {}, x, lambda path, leaf: "head" in path)
    assert_type(in_bfloat16(fs.with_mutable(model))({}, {}, x, train=True, scale=2.0), tuple[Array, fs.State])
    assert_type(twice(fs.with_optimizer(make_loss(model), tx))(carry, batch), tuple[fs.Carry, Array])
    gan: fs.Step[Batch, Array, [], Mine] = adversarial
    assert_type(fs.scan_steps(gan)(Mine(carry, carry), batch), tuple[Mine, Array])
    scan: Callable[..., Any] = jax.lax.scan
    scan(gan, Mine(carry, carry), batch)

    generator, critic, both = Generator(carry), Critic(carry), make_round(make_step(model, tx), make_step(model, tx))
    assert_type(both(generator, critic, batch), tuple[Generator, Critic])

    both(critic, generator, batch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    both(carry, carry, batch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    make_step(Fused(), tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    make_step(Classifier, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    make_step(model, tx)(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    make_step(model, tx)(carry, batch, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    make_compiled(model, tx)({}, batch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    make_evaluation(model)(carry)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    make_gradient(adversarial)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    in_bfloat16(fs.with_mutable(model))({}, {}, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    twice(gan)(carry, batch)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    features(Coder(), {}, x, "head/*")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
