"""The mistakes of `wrong.py`, line for line, through Flax, JAX and optax alone: no checker says a word.

The few lines with an ignore are rejected where the overlay of `stubs/` is installed, as in `make types`.
"""

import functools
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax import Array

from tests.typing.models import Classifier, Coder, Tagger

Tree = dict[str, Any]
classifier, coder, tagger = Classifier(), Coder(), Tagger()

mapped = jax.vmap(functools.partial(classifier.apply, mutable=["batch_stats"]), in_axes=(None, 0))
chain = jax.jit(mapped)


def loss_fn(params: Tree, state: Tree, batch: tuple[Array, Array]) -> tuple[Array, Tree]:
    return batch[0].mean(), state


def aux_fn(params: Tree, state: Tree, batch: Array) -> tuple[tuple[Array, int], Tree]:
    return (batch, 1), state


def lossless(params: Tree, state: Tree, batch: Array) -> tuple[None, Tree]:
    return None, state


def swapped(params: Tree, state: Tree, batch: Array) -> tuple[Tree, Array]:
    return state, batch


def stateless(params: Tree, state: Tree, batch: Array) -> Array:
    return batch


class Weights(TypedDict):
    w: Array


class Layers(NamedTuple):
    body: Array
    head: Array


def weights_fn(params: Weights, state: Tree, batch: Array, key: Array, *, clip: float = 1.0) -> tuple[Array, Tree]:
    return batch.mean() * clip, state


def layers_fn(params: Layers, state: Tree, batch: Array) -> tuple[tuple[Array, Layers], Tree]:
    return (batch.mean(), params), state


def misplaced(params: Tree, batch: Array, state: Tree) -> tuple[Array, Tree]:
    return batch, state


def batchless(params: Tree, state: Tree) -> tuple[Array, Tree]:
    return params["w"], state


def mine(carry: Layers, batch: Array) -> tuple[Layers, Array]:
    return carry, batch


def keyed_step(train_state: TrainState, batch: Array, key: Array, *, clip: float = 1.0) -> tuple[TrainState, Array]:
    return train_state, batch


def image_step(train_state: TrainState, x: Array, y: Array, *, train: bool) -> tuple[TrainState, Array, Array]:
    return train_state, x, y


def train_step(train_state: TrainState, batch: tuple[Array, Array]) -> tuple[TrainState, Array]:
    return train_state, batch[0].mean()


def train_step_with_aux(train_state: TrainState, batch: Array) -> tuple[TrainState, tuple[Array, int]]:
    return train_state, (batch.mean(), 1)


def epoch(train_state: TrainState, batches: tuple[Array, Array]) -> tuple[TrainState, Array]:
    return jax.lax.scan(train_step, train_state, batches)


def stack(*leaves: Array) -> Array:
    return jnp.stack(leaves)


jitted = jax.jit(train_step, donate_argnums=0)
aux_step = jax.jit(train_step_with_aux, donate_argnums=0)
grads_of = jax.value_and_grad(weights_fn, has_aux=True)
aux_grads_of = jax.value_and_grad(layers_fn, has_aux=True)
each_grads_of = jax.vmap(grads_of, in_axes=(None, None, 0, None))
keyed = jax.jit(keyed_step, donate_argnums=0)
images = jax.jit(image_step)
evaluate = jax.jit(classifier.apply)
scanned = jax.jit(epoch, donate_argnums=0)


def wrong_arguments(params: Tree, variables: Tree, x: Array) -> None:
    classifier.apply(variables, mutable=["batch_stats"])
    classifier.apply(variables, "x", mutable=["batch_stats"])
    classifier.apply(variables, [1.0, 2.0], mutable=["batch_stats"])
    classifier.apply(variables, None, mutable=["batch_stats"])
    classifier.apply(variables, (x, x), mutable=["batch_stats"])
    classifier.apply(variables, {"x": x}, mutable=["batch_stats"])
    classifier.apply(variables, x, trian=True, mutable=["batch_stats"])
    classifier.apply(variables, x, training=True, mutable=["batch_stats"])
    classifier.apply(variables, x, "train", mutable=["batch_stats"])
    classifier.apply(variables, x, x, mutable=["batch_stats"])
    classifier.apply(variables, x, train=x, mutable=["batch_stats"])
    classifier.apply(variables, x, True, 2.0, mutable=["batch_stats"])
    classifier.apply(variables, x, scale="2", mutable=["batch_stats"])
    classifier.apply(variables, x, scale=None, mutable=["batch_stats"])
    classifier.apply(variables, x, x=x, mutable=["batch_stats"])
    classifier.apply(variables, inputs=x, mutable=["batch_stats"])
    classifier.apply({"params": params}, x, mutable=["batch_stats"])
    classifier.apply(variables, x, mutable=["batch_stats"])[0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_two_outputs(variables: Tree, x: Array) -> None:
    coder.apply(variables, x, mutable=["batch_stats"])
    coder.apply(variables, x, x, x, mutable=["batch_stats"])
    coder.apply(variables, x, y="y", mutable=["batch_stats"])
    coder.apply(variables, x, z=x, mutable=["batch_stats"])
    coder.apply(variables, (x, x), mutable=["batch_stats"])
    coder.apply(variables, x, x, mutable=["batch_stats"])[0].mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    coder.apply(variables, x, x, mutable=["batch_stats"])[0][1].decoded  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_method(variables: Tree, x: Array) -> None:
    coder.apply(variables, x, method=Coder.encode, mutable=["batch_stats"])
    coder.apply(variables, x, "3", method=Coder.encode, mutable=["batch_stats"])
    coder.apply(variables, x, x, method=Coder.encode, mutable=["batch_stats"])
    coder.apply(variables, x, deep=3, method=Coder.encode, mutable=["batch_stats"])
    coder.apply(variables, x, 3, 4, method=Coder.encode, mutable=["batch_stats"])
    coder.apply(variables, x, 3, method=Coder.encode, mutable=["batch_stats"])[0].code  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_jaxtyping(variables: Tree, x: Array) -> None:
    tagger.apply(variables, x, mutable=["batch_stats"])
    tagger.apply(variables, x, True, mutable=["batch_stats"])
    tagger.apply(variables, x, masks=x, mutable=["batch_stats"])
    tagger.apply(variables, x, mask=[True], mutable=["batch_stats"])
    tagger.apply(variables, x, x > 0, mutable=["batch_stats"])[0].tags  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_rngs(variables: Tree, x: Array, key: Array) -> None:
    classifier.apply(variables, rngs={"dropout": key}, mutable=["batch_stats"])
    classifier.apply(variables, x, trian=True, rngs={"dropout": key}, mutable=["batch_stats"])
    classifier.apply(variables, x, deterministic=False, rngs={"dropout": key}, mutable=["batch_stats"])
    classifier.apply(variables, x, train="yes", rngs={"dropout": key}, mutable=["batch_stats"])
    classifier.apply(variables, x, True, 0.5, rngs={"dropout": key}, mutable=["batch_stats"])


def wrong_vmap(variables: Tree, x: Array) -> None:
    mapped(variables)
    mapped(variables, "x")
    mapped(variables, x, x)
    mapped(variables, x, trian=True)
    mapped(variables, x, scale="2")


def wrong_capture(variables: Tree, x: Array) -> None:
    classifier.apply(variables, mutable=["intermediates"])
    classifier.apply(variables, x, trian=True, mutable=["intermediates"])
    classifier.apply(variables, x, mutable=["intermediates"])[0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_chain(variables: Tree, x: Array) -> None:
    chain(variables)
    chain(variables, 3.0)
    chain(variables, x, trian=True)
    chain(variables, x, True, 2.0)
    chain(variables, x, scale="2")
    chain(variables, x)[0].logits


def wrong_losses() -> None:
    jax.value_and_grad(loss_fn)
    jax.value_and_grad(aux_fn)
    jax.value_and_grad(lossless, has_aux=True)
    jax.value_and_grad(swapped, has_aux=True)
    jax.value_and_grad(stateless, has_aux=True)


def wrong_steps(params: Tree, train_state: TrainState, x: Array) -> None:
    jitted(train_state)
    jitted(train_state, x)
    jitted(train_state, (x, x, x))
    jitted(train_state, (x, "y"))
    jitted(train_state, {"x": x})
    jitted(train_state, (x, x), x)
    jitted(params, (x, x))
    jitted((x, x), train_state)
    jitted(train_state, batches=(x, x))
    jitted.lower(train_state, x)
    jitted.trace(train_state)
    jitted(train_state, (x, x))[0].parameters
    jitted(train_state, (x, x))[1].loss


def wrong_aux(train_state: TrainState, x: Array) -> None:
    aux_step(train_state, (x, x))
    aux_step(train_state, x)[1].mean()
    aux_step(train_state, x)[1][1].logits


def wrong_scans(params: Tree, train_state: TrainState, x: Array) -> None:
    scanned(train_state, x)
    scanned(train_state, [(x, x)])
    scanned(params, (x, x))
    scanned((x, x), train_state)
    scanned(train_state, jax.tree.map(stack, *[x]))
    scanned(train_state, jax.tree.map(stack, *[(x, x)])[0])


def wrong_gradients(weights: Weights, layers: Layers, state: Tree, x: Array) -> None:
    grads_of(weights, state, x)
    grads_of(weights, state, "x", x)
    grads_of(weights, state, x, 0)
    grads_of(weights, state, x, x, clip="1")
    grads_of(weights, state, x, x, clop=1.0)
    grads_of(weights, state, x, x, 1.0)
    grads_of(layers, state, x, x)
    grads_of(weights, x, state, x)
    grads_of(weights, state, x, x)[0].mean()
    grads_of(weights, state, x, x)[1]["v"]
    aux_grads_of(layers, state, x)[1].tail
    aux_grads_of(layers, state, x)[0].mean()
    aux_grads_of(weights, state, x)
    each_grads_of(weights, state, x)
    each_grads_of(layers, state, x, x)


def wrong_losses_of_gradients() -> None:
    jax.value_and_grad(loss_fn, has_aux=False)
    jax.value_and_grad(aux_fn, has_aux=False)
    jax.value_and_grad(lossless)
    jax.value_and_grad(swapped)
    jax.value_and_grad(stateless)
    jax.value_and_grad(misplaced)
    jax.value_and_grad(batchless)


def wrong_updates(train_state: TrainState, params: Tree, state: Tree, x: Array) -> None:
    train_state.apply_gradients(grads=params)
    train_state.apply_gradients(grads=train_state)
    train_state.apply_gradients(grads=params, batch_stats=train_state)
    train_state.apply_gradients(grads=params, batch_stats=x)
    train_state.apply_gradients(grads=params).parameters  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_further_arguments(train_state: TrainState, x: Array) -> None:
    keyed(train_state, x)
    keyed(train_state, x, "key")
    keyed(train_state, x, x, clip=x)
    keyed(train_state, x, x, clop=1.0)
    keyed(train_state, x, x, 1.0)
    keyed.lower(train_state, x)
    images(train_state, x)
    images(train_state, x, x, True)
    images(train_state, x, x, train=x)
    images(x, x, x, train=True)
    images(train_state, x, x, train=True)[1].loss


def wrong_evaluation(params: Tree, state: Tree, x: Array) -> None:
    evaluate(params, x)
    evaluate({**state, "params": params})
    evaluate({**state, "params": params}, "x")
    evaluate({**state, "params": params}, x, trian=True)
    evaluate({**state, "params": params}, x).logits


def wrong_settling(params: Tree, state: Tree, x: Array) -> None:
    jax.eval_shape(classifier.apply, state)
    jax.eval_shape(classifier.apply, state, "x")
    jax.eval_shape(classifier.apply, state, x, trian=True)
    jax.eval_shape(grads_of, params, state, x)


def wrong_averages() -> None:
    jax.jit(mine)
    jax.jit(loss_fn)


def wrong_skips(train_state: TrainState, x: Array) -> None:
    jax.jit(mine)
    jax.jit(loss_fn)
    keyed(train_state)
    keyed(x, x, x)
    keyed(train_state, x, x)[1].los
