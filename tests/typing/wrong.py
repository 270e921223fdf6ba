"""Wrong calls, one a line, that both checkers reject; `wrong_flax.py` makes the same mistakes with Flax alone.

Each line names the error of each checker. `tools/types_table.py` reads the two files side by side.
"""

from typing import Any, NamedTuple, TypedDict

import optax
from jax import Array

import flaxsplit as fs
from tests.typing.models import Classifier, Coder, Tagger

Tree = dict[str, Any]
classifier, coder, tagger = Classifier(), Coder(), Tagger()

apply = fs.with_mutable(classifier)
code = fs.with_mutable(coder)
encode = fs.with_mutable(coder, method=Coder.encode)
tag = fs.with_mutable(tagger)
drop = fs.with_rngs(fs.with_mutable(classifier))
mapped = fs.vmap_stateful(fs.with_mutable(classifier))
sown = fs.with_mutable(classifier, capture="intermediates")
chain = fs.assert_max_traces(fs.with_rngs(fs.vmap_stateful(fs.with_mutable(classifier))))


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


def image_step(carry: fs.Carry, x: Array, y: Array, *, train: bool) -> tuple[fs.Carry, Array, Array]:
    return carry, x, y


tx = optax.adam(1e-3)
step = fs.with_optimizer(loss_fn, tx)
jitted = fs.jit_step(fs.assert_max_traces(fs.with_ema(step, decay=0.9)))
aux_step = fs.jit_step(fs.with_optimizer(aux_fn, tx, has_aux=True))
scanned = fs.jit_step(fs.scan_steps(step))
grads_of = fs.value_and_grad(weights_fn)
aux_grads_of = fs.value_and_grad(layers_fn, has_aux=True)
each_grads_of = fs.with_rngs(fs.assert_max_traces(grads_of))
keyed = fs.jit_step(fs.assert_max_traces(fs.scan_steps(fs.with_ema(fs.with_optimizer(weights_fn, tx), decay=0.9))))
images = fs.jit_step(image_step, donate=False)
evaluate = fs.jit_step(fs.with_mutable(classifier, mutable=False), donate=False)


def wrong_arguments(params: Tree, state: Tree, x: Array) -> None:
    apply(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, state, "x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, [1.0, 2.0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, {"x": x})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, state, x, training=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, state, x, "train")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, train=x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, True, 2.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, scale=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    apply(params, state, x, x=x)  # type: ignore[misc]  # pyright: ignore[reportCallIssue]
    apply(params, state, inputs=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, x)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    apply(params, state, x)[0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_two_outputs(params: Tree, state: Tree, x: Array) -> None:
    code(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    code(params, state, x, x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    code(params, state, x, y="y")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    code(params, state, x, z=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    code(params, state, (x, x))  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    code(params, state, x, x)[0].mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    code(params, state, x, x)[0][1].decoded  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_method(params: Tree, state: Tree, x: Array) -> None:
    encode(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    encode(params, state, x, "3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    encode(params, state, x, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    encode(params, state, x, deep=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    encode(params, state, x, 3, 4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    encode(params, state, x, 3)[0].code  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_jaxtyping(params: Tree, state: Tree, x: Array) -> None:
    tag(params, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    tag(params, state, x, True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    tag(params, state, x, masks=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    tag(params, state, x, mask=[True])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    tag(params, state, x, x > 0)[0].tags  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_rngs(params: Tree, state: Tree, x: Array) -> None:
    drop(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    drop(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    drop(params, state, x, deterministic=False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    drop(params, state, x, train="yes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    drop(params, state, x, True, 0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_vmap(params: Tree, state: Tree, x: Array) -> None:
    mapped(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    mapped(params, state, "x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    mapped(params, state, x, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    mapped(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    mapped(params, state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_capture(params: Tree, state: Tree, x: Array) -> None:
    sown(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sown(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    sown(params, state, x)[0][0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_chain(params: Tree, state: Tree, x: Array) -> None:
    chain(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    chain(params, state, 3.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    chain(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    chain(params, state, x, True, 2.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    chain(params, state, x, scale="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    chain(params, state, x)[0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_losses() -> None:
    fs.with_optimizer(loss_fn, tx, has_aux=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    fs.with_optimizer(aux_fn, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_optimizer(lossless, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_optimizer(swapped, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.with_optimizer(stateless, tx)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_steps(params: Tree, carry: fs.Carry, x: Array) -> None:
    jitted(carry)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jitted(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted(carry, (x, x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted(carry, (x, "y"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted(carry, {"x": x})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
    jitted(carry, (x, x), x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jitted(params, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted((x, x), carry)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted(carry, batches=(x, x))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jitted.lower(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    jitted.trace(carry)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    jitted(carry, (x, x))[0].parameters  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    jitted(carry, (x, x))[1].loss  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_aux(carry: fs.Carry, x: Array) -> None:
    aux_step(carry, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    aux_step(carry, x)[1].mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    aux_step(carry, x)[1][1].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_scans(params: Tree, carry: fs.Carry, x: Array) -> None:
    scanned(carry, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scanned(carry, [(x, x)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scanned(params, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scanned((x, x), carry)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scanned(carry, next(fs.stack_batches([x], 10)))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    scanned(carry, next(fs.stack_batches([(x, x)], 10))[0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_gradients(weights: Weights, layers: Layers, state: Tree, x: Array) -> None:
    grads_of(weights, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    grads_of(weights, state, "x", x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grads_of(weights, state, x, 0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grads_of(weights, state, x, x, clip="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grads_of(weights, state, x, x, clop=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    grads_of(weights, state, x, x, 1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    grads_of(layers, state, x, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grads_of(weights, x, state, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    grads_of(weights, state, x, x)[0].mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    grads_of(weights, state, x, x)[0][1]["v"]  # type: ignore[typeddict-item]  # pyright: ignore[reportGeneralTypeIssues]
    aux_grads_of(layers, state, x)[0][1].tail  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    aux_grads_of(layers, state, x)[0][0].mean()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    aux_grads_of(weights, state, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    each_grads_of(weights, state, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    each_grads_of(layers, state, x, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_losses_of_gradients() -> None:
    fs.value_and_grad(loss_fn, has_aux=True)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    fs.value_and_grad(aux_fn)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.value_and_grad(lossless)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.value_and_grad(swapped)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.value_and_grad(stateless)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.value_and_grad(misplaced)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.value_and_grad(batchless)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wrong_updates(carry: fs.Carry, params: Tree, state: Tree, x: Array) -> None:
    fs.apply_gradients(tx, carry, params)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.apply_gradients(carry, tx, params, state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.apply_gradients(tx, params, carry, state)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.apply_gradients(tx, carry, params, x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.apply_gradients(tx, carry, params, state).parameters  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_further_arguments(carry: fs.Carry, x: Array) -> None:
    keyed(carry, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    keyed(carry, x, "key")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    keyed(carry, x, x, clip=x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    keyed(carry, x, x, clop=1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    keyed(carry, x, x, 1.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    keyed.lower(carry, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    images(carry, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    images(carry, x, x, True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    images(carry, x, x, train=x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    images(x, x, x, train=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    images(carry, x, x, train=True)[1].loss  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_evaluation(params: Tree, state: Tree, x: Array) -> None:
    evaluate(params, x)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    evaluate(params, state)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    evaluate(params, state, "x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    evaluate(params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    evaluate(params, state, x)[0].logits  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def wrong_settling(params: Tree, state: Tree, x: Array) -> None:
    fs.settle_state(apply, params, state)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    fs.settle_state(apply, params, state, "x")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    fs.settle_state(apply, params, state, x, trian=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.settle_state(grads_of, params, state, x)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


def wrong_averages() -> None:
    fs.with_ema(mine, decay=0.9)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.with_ema(loss_fn, decay=0.9)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


def wrong_skips(carry: fs.Carry, x: Array) -> None:
    fs.skip_nonfinite(mine)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.skip_nonfinite(loss_fn)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    fs.skip_nonfinite(step)(carry)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    fs.skip_nonfinite(step)(x, (x, x))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    fs.skip_nonfinite(step)(carry, (x, x))[1].los  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
