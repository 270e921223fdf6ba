"""Run it and improve it: from a loss function to a step, and from a step to many."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from ._carry import check_drift
from ._checks import check_count, check_form, check_function, check_leaves, check_tx, checked, names_of, two_of
from ._describe import abstract, describe, differences, is_array, is_numeric, keyed_leaves, same_structure, wraps
from ._errors import CollectionError, SignatureError, UnsyncedStateError
from ._rngs import check_bound
from ._types import AxisName, Carry, JittedStep, LossFn, Step

if TYPE_CHECKING:
    import typing_extensions  # typing itself takes a default from Python 3.13 on

    # What a lambda leaves open is then Any to mypy, and not Never, which no batch is.
    C = typing_extensions.TypeVar("C", default=Any)
    BatchT = typing_extensions.TypeVar("BatchT", default=Any)
    AuxT = typing_extensions.TypeVar("AuxT", default=Any)
    OutT = typing_extensions.TypeVar("OutT", default=Any)
else:
    C, BatchT, AuxT, OutT = map(TypeVar, ("C", "BatchT", "AuxT", "OutT"))
T = TypeVar("T")


@overload
def with_optimizer(
    loss_fn: LossFn[BatchT, tuple[Float[Array, ""], AuxT]],
    tx: optax.GradientTransformation,
    *,
    has_aux: Literal[True],
    microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Step[Carry, BatchT, tuple[Float[Array, ""], AuxT]]: ...
@overload
def with_optimizer(
    loss_fn: LossFn[BatchT, Float[Array, ""]],
    tx: optax.GradientTransformation,
    *,
    has_aux: Literal[False] = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Step[Carry, BatchT, Float[Array, ""]]: ...
@checked
def with_optimizer(
    loss_fn: Any,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Any:
    """Turns a loss function into a step: `step(carry, batch) -> (carry, loss)`.

    Law: equals the loop written out, bit for bit: `jax.value_and_grad(loss_fn, has_aux=True)`, `tx.update`,
    `optax.apply_updates`, with the state threaded.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> def loss_fn(params, state, batch):
    ...     return jnp.sum((params["w"] - batch) ** 2), state
    >>> tx = optax.sgd(0.1)
    >>> carry, loss = fs.with_optimizer(loss_fn, tx)(fs.init_carry({"w": jnp.ones(3)}, {}, tx), jnp.zeros(3))
    >>> float(loss), carry.step
    (3.0, Array(1, dtype=int32))

    Args:
        loss_fn: `(params, state, batch) -> (loss, new_state)`, the loss a real scalar.
        tx: an optax transformation; `value=`, `grad=` and `value_fn=` reach one that wants them.
        has_aux: whether `loss_fn` returns `((loss, aux), new_state)`; the step's `out` is then `(loss, aux)`.
        microbatches: accumulates the mean gradient over so many parts of the batch's leading axis, one after another,
            threading the state. Losses are averaged; `aux` comes out stacked, as from `jax.lax.scan`.
        axis_name: averages loss and gradients over this axis of an enclosing `shard_map`, `pmap` or `vmap`.

    Returns:
        A step: the body that `jax.lax.scan` takes. Not jitted: see `jit_step`.

    Raises:
        SignatureError: `loss_fn` returns something else, a param is not differentiable, the batch is indivisible, the
            carry was made for another optimizer, or `axis_name` is not bound.
        StateDriftError: state, params or opt_state would come out in another structure, shape or dtype.
        UnsyncedStateError: under `shard_map` a state leaf would come out different per device of `axis_name`.

    As the update step of Flax's guide on managing params and state, in one word.
    """
    fix = "def loss_fn(params, state, batch): ...; return loss, new_state"
    check_function("with_optimizer(loss_fn, tx)", "loss_fn", loss_fn, fix)
    check_tx("with_optimizer(loss_fn, tx)", tx)
    tx = optax.with_extra_args_support(tx)
    check_count("with_optimizer(loss_fn, tx, microbatches=...)", microbatches)

    @wraps(loss_fn, ("carry",), replaces=2)
    def step(carry: Carry, batch: Any) -> tuple[Carry, Any]:
        _check_carry(carry)
        if axis_name is not None:
            check_bound("with_optimizer(axis_name=...)", axis_name)
        count, params, state, _ = carry

        def objective(_params: Any, _state: Any, _batch: Any) -> tuple[Any, Any]:
            _out, _new_state = _returned(loss_fn(_params, _state, _batch), has_aux)
            _loss, _aux = _out if has_aux else (_out, ())
            _new_state = check_drift("with_optimizer(loss_fn, tx)", "state", _state, _new_state)
            if axis_name is not None:
                _check_synced(_state, _new_state, axis_name)
            return _loss, (_aux, _new_state)

        def gradient(_state: Any, _batch: Any) -> tuple[Any, Any, Any]:
            (_loss, (_aux, _state)), _grads = jax.value_and_grad(objective, has_aux=True)(local, _state, _batch)
            return _grads, (_loss, _aux), _state

        def value_fn(_params: Any, *_: Any, **__: Any) -> Any:
            def part(_state: Any, _batch: Any) -> tuple[Any, Any, Any]:
                _loss, (_, _state) = objective(_params, _state, _batch)
                return (), _loss, _state

            _losses: Any = accumulate(part, (), state, batch)[1]
            return _averaged(jnp.mean(_losses), axis_name)

        def accumulate(part: Any, like: Any, _state: Any, _batch: Any) -> tuple[Any, Any, Any]:
            if microbatches == 1:
                return cast(tuple[Any, Any, Any], part(_state, _batch))
            return _accumulated(part, _varying(_zeros(like), axis_name), _state, _split_batch(_batch, microbatches))

        local = _varying(params, axis_name)  # differentiated per device, so that the mean below is the only reduction
        grads, (loss, aux), new_state = accumulate(gradient, params, state, batch)
        loss = loss if microbatches == 1 else jnp.mean(loss)
        loss, grads = _averaged((loss, grads), axis_name)
        new_params, new_opt_state = _updated(tx, grads, carry, value=loss, grad=grads, value_fn=value_fn)
        return Carry(count + 1, new_params, new_state, new_opt_state), ((loss, aux) if has_aux else loss)

    return step


def _updated(tx: optax.GradientTransformationExtraArgs, grads: Any, carry: Carry, **extra: Any) -> tuple[Any, Any]:
    where = "with_optimizer(loss_fn, tx)"
    try:
        updates, opt_state = tx.update(grads, carry.opt_state, carry.params, **extra)
    except Exception as error:
        made = differences(jax.eval_shape(tx.init, carry.params), carry.opt_state, "carry.opt_state")
        if not made:
            raise
        raise SignatureError(
            where,
            "carry.opt_state must be what tx.init(params) gives (tx -> carry)",
            [str(each) for each in made],
            "the carry was made with another tx, or for other params",
            "init_carry(params, state, tx) with the tx of the step",
        ) from error
    params = check_drift(where, "params", carry.params, optax.apply_updates(carry.params, updates))
    return params, check_drift(where, "opt_state", carry.opt_state, opt_state)


def _accumulated(part: Any, zeros: Any, state: Any, batches: Any) -> tuple[Any, Any, Any]:
    """Sums in at least f32, so that many small bf16 gradients are not lost in their sum; the mean is cast back."""
    dtypes: list[Any] = []

    def body(total_and_state: Any, batch: Any) -> tuple[Any, Any]:
        _total, _state = total_and_state
        _sum, _out, _state = part(_state, batch)
        dtypes[:] = [leaf.dtype for leaf in jax.tree.leaves(_sum)]
        return (jax.tree.map(jnp.add, _total, _sum), _state), _out

    (total, state), outs = jax.lax.scan(body, (zeros, state), batches)
    count = len(jax.tree.leaves(batches)[0])
    leaves, treedef = jax.tree.flatten(total)
    mean = [(leaf / count).astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return jax.tree.unflatten(treedef, mean), outs, state


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), tree)


def _split_batch(batch: Any, count: int) -> Any:
    strange = [
        f"{path}: {describe(leaf)}"
        for path, leaf in keyed_leaves(batch, "batch").items()
        if not is_array(leaf) or not leaf.shape or leaf.shape[0] % count
    ]
    if strange or not jax.tree.leaves(batch):
        raise SignatureError(
            "with_optimizer(loss_fn, tx, microbatches=...)",
            f"the leading axis of every batch leaf must be divisible by {count}",
            strange or ["no leaf in the batch"],
            "a ragged last batch, or a leaf without a batch axis",
            "drop or pad the last batch, or choose microbatches that divide it",
        )
    return jax.tree.map(lambda leaf: leaf.reshape(count, leaf.shape[0] // count, *leaf.shape[1:]), batch)


def _check_synced(before: Any, after: Any, axis_name: AxisName) -> None:
    """Names what came in the same on every device of a mesh axis and would come out different.

    JAX says only that an `out_specs` is wrong, and advises `check_vma=False`: each device would keep its own, unseen.
    """
    names = set(names_of(axis_name))
    old, new = keyed_leaves(before, "state"), keyed_leaves(after, "state")
    strange = [f"{path}: differs per device" for path, leaf in new.items() if names & _marks(leaf) - _marks(old[path])]
    if strange:
        raise UnsyncedStateError(
            "with_optimizer(axis_name=...)",
            f"state must come out the same on every device of the axis {axis_name!r}",
            strange,
            "a layer that updates its state has no axis_name, or lacks this one",
            f"nn.BatchNorm(..., axis_name={axis_name!r}); or jax.lax.pmean(leaf, {axis_name!r}) in loss_fn",
        )


def _varying(tree: Any, axis_name: AxisName | None) -> Any:
    """Marks a tree as each device's own; else `shard_map` sums its gradients, and a mean would come too late.

    The axes of `vmap` and `pmap` have no such marks: there nothing is summed by itself.
    """
    names = names_of(axis_name) or ()
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", names)

    def mark(leaf: Any) -> Any:
        missing = tuple(name for name in names if name in manual and name not in _marks(leaf))
        return _pcast(leaf, missing) if missing else leaf

    return jax.tree.map(mark, tree)


def _marks(leaf: Any) -> frozenset[Any]:
    """The mesh axes along which `shard_map` has a leaf vary, by the older or the newer name of JAX."""
    kind: Any = jax.typeof(leaf)
    marks: frozenset[Any] = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return marks


def _pcast(leaf: Any, names: tuple[str, ...]) -> Any:
    lax: Any = jax.lax
    return lax.pcast(leaf, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(leaf, names)  # jax < 0.8


def _averaged(tree: T, axis_name: AxisName | None) -> T:
    return tree if axis_name is None else cast(T, jax.lax.pmean(tree, axis_name))


def _returned(result: Any, has_aux: bool) -> tuple[Any, Any]:
    form = "return (loss, aux), new_state" if has_aux else "return loss, new_state"
    if not isinstance(result, tuple) or len(result) != 2:
        if isinstance(result, tuple) and len(result) > 2:
            cause, form = "aux is beside the loss, not with it", "return (loss, aux), new_state, and has_aux=True"
        else:
            cause = "the new state was not returned"
        raise _misreturned("two things", [_form_of(result)], cause, form)
    out, new_state = result
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise _misreturned(
            "((loss, aux), new_state) where has_aux=True", [f"out: {_form_of(out)}"], "aux is missing", form
        )
    loss = out[0] if has_aux else out
    if not has_aux and isinstance(loss, tuple):
        fix = "with_optimizer(loss_fn, tx, has_aux=True)"
        raise _misreturned("a scalar loss first", [f"out: {_form_of(loss)}"], "loss_fn returns aux as well", fix)
    if not _is_real_scalar(loss):
        cause, loss_instead = _unlike_a_loss(loss)
        fix = form.replace("loss", loss_instead, 1)
        raise _misreturned("a real scalar loss, f32[]", [f"loss: {_form_of(loss)}"], cause, fix)
    return out, new_state


def _form_of(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else describe(value)


def _unlike_a_loss(loss: Any) -> tuple[str, str]:
    if isinstance(loss, Mapping):
        return "loss and state were swapped", "loss"
    if not is_array(loss):
        return "a Python object has no gradient", "jnp.mean(per_example)"
    if jnp.issubdtype(loss.dtype, jnp.complexfloating):
        return "the loss is complex", "jnp.abs(loss).mean()"
    if loss.shape == ():
        return "a count or a truth value has no gradient", "jnp.mean(per_example)"
    return "the loss was not reduced to one number", "loss.mean()"


def _is_real_scalar(loss: Any) -> bool:
    return is_array(loss) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)


def _misreturned(required: str, got: list[str], cause: str, fix: str) -> SignatureError:
    return SignatureError("with_optimizer(loss_fn, tx)", f"loss_fn must return {required}", got, cause, fix)


def _check_carry(carry: Any) -> None:
    if not isinstance(carry, Carry):
        raise SignatureError(
            "step(carry, batch)",
            "the first argument must be a Carry",
            [f"carry: {_form_of(carry)}"],
            "params were passed, or what a checkpoint gave back was not adopted",
            "init_carry(params, state, tx), or adopt_carry(restored, carry)",
        )
    check_leaves(
        "step(carry, batch)",
        "every leaf of the carry must be an array or a number",
        keyed_leaves(carry, "carry"),
        is_numeric,
        "the carry was put together by hand",
        "init_carry(params, state, tx)",
    )
    if not (is_array(carry.step) or isinstance(carry.step, int)) or jnp.shape(carry.step):
        raise SignatureError(
            "step(carry, batch)",
            "carry.step must be the count of updates, i32[]",
            [f"carry.step: {describe(carry.step)}"],
            "the carry was put together by hand",
            "init_carry(params, state, tx)",
        )
    check_leaves(
        "with_optimizer(loss_fn, tx)",
        "every param must be differentiable: of a floating or complex dtype",
        keyed_leaves(carry.params, "carry.params"),
        _is_differentiable,
        "counters or keys were split off as params",
        "split_params(variables, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact))",
        say=describe,
    )


def _is_differentiable(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact))


@checked
def with_ema(step: Step[Carry, BatchT, OutT], *, decay: float | Callable[[Any], Any]) -> Step[Carry, BatchT, OutT]:
    """Keeps an exponential moving average of the params in `state['ema']`.

    Law: after each step `ema = decay * ema + (1 - decay) * params`. Evaluates by `apply(carry.state["ema"], ...)`.

    >>> import jax.numpy as jnp, optax, flaxsplit as fs
    >>> loss_fn = lambda params, state, batch: (jnp.sum(params["w"] * batch), state)
    >>> tx, params = optax.sgd(1.0), {"w": jnp.ones(2)}
    >>> step = fs.with_ema(fs.with_optimizer(loss_fn, tx), decay=0.5)
    >>> carry, _ = step(fs.init_carry(params, {"ema": params}, tx), jnp.ones(2))
    >>> carry.params["w"], carry.state["ema"]["w"]
    (Array([0., 0.], dtype=float32), Array([0.5, 0.5], dtype=float32))

    Args:
        step: a step over a `Carry`.
        decay: how much of the average stays, between 0 and 1; or a schedule of the step count.

    Returns:
        A step with the same `out`.

    Raises:
        CollectionError: `state['ema']` is not there or not of the params' structure.
        SignatureError: `decay` is not between 0 and 1.

    As `optax.ema` on params instead of gradients; the average is state, so a scan, mesh or checkpoint carries it.
    """
    check_function("with_ema(step, decay=...)", "step", step, "with_ema(with_optimizer(loss_fn, tx), decay=0.999)")
    if not callable(decay) and not _is_fraction(decay):
        raise SignatureError(
            "with_ema(decay=...)",
            "a number between 0 and 1, or a schedule",
            [f"decay: {_number(decay)}"],
            "1 - decay was passed, or a percentage",
            "with_ema(step, decay=0.999)",
        )

    @wraps(step)
    def averaging(carry: Carry, batch: Any) -> tuple[Carry, Any]:
        _check_carry(carry)
        _check_ema(carry)
        ema = carry.state["ema"]
        new_carry, out = two_of(step(carry, batch), "with_ema(step)", "step(carry, batch) -> (carry, out)")
        weight = 1 - (decay(carry.step) if callable(decay) else decay)
        new_ema = optax.incremental_update(new_carry.params, ema, weight)
        new_ema = jax.tree.map(lambda new, old: new.astype(old.dtype), new_ema, ema)
        return new_carry._replace(state={**new_carry.state, "ema": new_ema}), out

    return averaging


def _number(value: Any) -> str:
    """Says an option as it was written, if it is a number: it is no value of the user's data."""
    return repr(value) if isinstance(value, int | float) else describe(value)


def _is_fraction(decay: Any) -> bool:
    if isinstance(decay, jax.Array):  # perhaps traced: its value is not there to be asked
        return decay.shape == ()
    return isinstance(decay, int | float | np.number) and bool(0 <= decay <= 1)


def _shapes(tree: Any) -> list[Any]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _check_ema(carry: Carry) -> None:
    """Compares structure and shapes; the average of bf16 params may be kept in f32."""
    ema = carry.state.get("ema", {})
    if not (same_structure(carry.params, ema) and _shapes(carry.params) == _shapes(ema)):
        changed = differences(carry.params, ema, "state['ema']")
        raise CollectionError(
            "with_ema(step)",
            "state['ema'] must have the structure of the params (params -> ema)",
            [str(each) for each in changed],
            "the average was not put into the state" if "ema" not in carry.state else "it belongs to other params",
            "init_carry(params, state | {'ema': params}, tx)",
        )


@checked
def scan_steps(step: Step[C, BatchT, OutT], *, unroll: int = 1) -> Step[C, BatchT, OutT]:
    """Runs many steps in one dispatch: `(carry, batches) -> (carry, outs)` over a leading axis.

    Law: equals calling `step` in a loop and stacking the outs. Equals `lambda c, b: jax.lax.scan(step, c, b)`.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> fs.scan_steps(lambda carry, batch: (carry + batch, carry))(jnp.int32(0), jnp.arange(4))
    (Array(6, dtype=int32), Array([0, 0, 1, 3], dtype=int32))

    Args:
        step: a step over any carry.
        unroll: as in `jax.lax.scan`.

    Returns:
        A step over stacked batches; see `stack_batches`.

    Raises:
        SignatureError: the batches' leading axes differ.
        StateDriftError: the carry comes out in another structure, shape or dtype.
    """
    check_function("scan_steps(step)", "step", step, "scan_steps(with_optimizer(loss_fn, tx))")
    if not isinstance(unroll, bool):
        check_count("scan_steps(step, unroll=...)", unroll)

    @wraps(step)
    def scanned(carry: Any, batches: Any) -> tuple[Any, Any]:
        _check_leading(batches)

        def body(_carry: Any, _batch: Any) -> tuple[Any, Any]:
            _new_carry, _out = two_of(step(_carry, _batch), "scan_steps(step)", "step(carry, batch) -> (carry, out)")
            return check_drift("scan_steps(step)", "carry", _carry, _new_carry), _out

        return jax.lax.scan(body, carry, batches, unroll=unroll)

    return scanned


def _check_leading(batches: Any) -> None:
    leaves = keyed_leaves(batches, "batches")
    sizes = {leaf.shape[0] if is_array(leaf) and leaf.shape else None for leaf in leaves.values()}
    if len(sizes) != 1 or None in sizes:
        got = [f"{path}: {describe(leaf)}" for path, leaf in leaves.items()]
        raise SignatureError(
            "scan_steps(step)",
            "every leaf of batches must have one leading axis, of one size: the steps",
            got or ["no leaf in batches"],
            "a single batch was passed, or batches were stacked apart",
            "for batches in stack_batches(loader, 10): carry, outs = step(carry, batches)",
        )


@checked
def stack_batches(batches: Iterable[BatchT], size: int) -> Iterator[BatchT]:
    """Stacks batches from any iterable, `size` at a time, for `scan_steps`.

    Law: `[b for stack in stack_batches(batches, n) for b in unstacked(stack)] == list(batches)`: none is lost.

    >>> import numpy as np, flaxsplit as fs
    >>> ragged = [np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((1, 2))]
    >>> [stack.shape for stack in fs.stack_batches(ragged, 2)]
    [(2, 4, 2), (1, 4, 2), (1, 1, 2)]

    Args:
        batches: an iterable of batches; read lazily, so it may be endless.
        size: how many to stack.

    Yields:
        Stacks of `size` batches; fewer at the end, and where the next batch has another shape (the ragged end).

    Raises:
        SignatureError: `batches` cannot be iterated, or is one batch; `size` is not a whole number of at least 1.
    """
    given: Any = batches
    fits = isinstance(given, Iterable) and not isinstance(given, Mapping | str | type)
    required, fix = "an iterable of batches", "stack_batches(loader, 10)"
    check_form("stack_batches(batches, size)", "batches", batches, fits, required, fix)
    check_count("stack_batches(batches, size=...)", size)
    return _stacks(batches, size)


def _stacks(batches: Iterable[Any], size: int) -> Iterator[Any]:
    for _, same in itertools.groupby(batches, key=lambda batch: jax.tree.flatten(abstract(batch))):
        while group := list(itertools.islice(same, size)):
            yield jax.tree.map(_stacked, *group)


def _stacked(*leaves: Any) -> Any:
    return np.stack(leaves) if not any(isinstance(leaf, jax.Array) for leaf in leaves) else jnp.stack(leaves)


@checked
def jit_step(step: Step[C, BatchT, OutT], *, like: Any = None, donate: bool = True) -> JittedStep[C, BatchT, OutT]:
    """Compiles a step, the carry donated.

    Law: equals `jax.jit(step, donate_argnums=0)`, and is the object that it returns: `.lower`, `.trace` and the C++
    fast path are there.

    >>> import jax.numpy as jnp, flaxsplit as fs
    >>> step = fs.jit_step(lambda carry, batch: (carry + batch, carry))
    >>> step(jnp.zeros(2), jnp.ones(2))[0]
    Array([1., 1.], dtype=float32)

    Args:
        step: a step over any pytree: a `Carry`, a `TrainState`.
        like: a carry whose shardings the carry that comes out is to have, so that on a mesh the second call hits the
            first call's executable. On one device all arguments are pinned to it: whether they are committed, as after
            `jax.device_put`, no longer matters; without `like` JAX compiles once for each mixture of these.
        donate: whether the carry's buffers are reused. A carry can then be passed once: a second time JAX says
            in its own words that it was deleted, since nothing of ours runs at a dispatch.

    Returns:
        The compiled step.

    Raises:
        SignatureError: a leaf of `like` has no sharding.
    """
    check_function("jit_step(step)", "step", step, "jit_step(with_optimizer(loss_fn, tx))")
    donated: Any = (0,) if donate else ()
    pinned: Any = {} if like is None else _pinned(_shardings(like))
    jitted: Any = jax.jit(step, donate_argnums=donated, **pinned)
    return cast(JittedStep[C, BatchT, OutT], jitted)


def _pinned(shardings: Any) -> dict[str, Any]:
    places = set(jax.tree.leaves(shardings))
    only = places.pop() if len(places) == 1 else None
    out = {"out_shardings": (shardings, None)}
    return {"in_shardings": only, **out} if isinstance(only, SingleDeviceSharding) else out


def _shardings(like: Any) -> Any:
    check_leaves(
        "jit_step(like=...)",
        "every leaf of like must say its sharding",
        keyed_leaves(like, "like"),
        lambda leaf: getattr(leaf, "sharding", None) is not None,
        "abstract values without a sharding, NumPy arrays or numbers",
        "jit_step(step, like=init_carry(params, state, tx))",
    )
    return jax.tree.map(lambda leaf: leaf.sharding, like)
