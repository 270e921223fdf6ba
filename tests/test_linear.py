"""State is linear: an update that a loss loses and a key that it draws from twice are told, and nothing else is."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs
from flaxsplit import _linear

from . import strategies as some
from .drawn_models import BatchNorm, Dropout, Model, Remember, Stack
from .flags import needs_jit
from .meshes import KINDS, line
from .models import Dropping, Sowing
from .test_fuzz import applied, begun, error, wrapped
from .test_messages import whole

X = jax.random.normal(jax.random.key(0), (8, 3), jnp.float32)
TX = optax.sgd(0.1)
KEY = jax.random.key(3)
ON_PURPOSE = "; or, to drop an update on purpose, fn(params, jax.tree.map(jnp.copy, state), x)"
KEYS = {"rngs", "rng_counts"}


class Both(nnx.Module):
    """Statistics and dropout, in NNX."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0, dropout=1)
        self.norm, self.drop = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any, train: bool = True) -> Any:
        """Normalizes and drops."""
        return self.drop(self.norm(x, use_running_average=not train), deterministic=not train)


class Layers(nn.Module):
    """Layers under `nn.scan`, which hands on as another object what no layer wrote."""

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        """Runs three of them."""
        variables = {"params": 0, "batch_stats": 0}
        axes: Any = {"variable_axes": variables, "split_rngs": {"params": True, "dropout": True}, "length": 3}
        layer = nn.remat(Layer)
        return nn.scan(lambda layer, x, _: (layer(x), None), **axes)(layer(train), x, None)[0]


class Layer(nn.Module):
    """One of them."""

    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Normalizes and drops."""
        return nn.Dropout(0.5, deterministic=not self.train)(nn.BatchNorm(not self.train)(x))


def linen(model: nn.Module, wrap: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """A stateful function with its params and state."""
    variables = model.init({"params": KEY, "dropout": KEY}, X, train=False)
    params, state = fs.split_params(variables)
    return wrap(fs.with_mutable(model)), params, state | fs.rng_state(dropout=KEY)


FUNCTIONS = {
    "with_rngs": linen(Dropping(None), fs.with_rngs),
    "vmap_stateful": linen(Dropping(), lambda fn: fs.with_rngs(fs.vmap_stateful(fn))),
    "inside": linen(Dropping(), lambda fn: fs.vmap_stateful(fs.with_rngs(fn))),
    "layers": linen(Layers(), fs.with_rngs),
    "from_nnx": fs.from_nnx(Both()),
}
Loss = Callable[[Any, Any, Any], tuple[Any, Any]]


def twice(fn: Any, mistake: str = "none") -> Loss:
    """A loss that calls a model twice, rightly or with a mistake."""

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        one, first = fn(params, state, batch)
        two, second = fn(params, state if mistake == "forked" else first, batch + 1)
        keys = {name: tree for name, tree in first.items() if name in KEYS}
        returned = {"none": second, "forked": second, "keys": second | keys, "stale": first, "dropped": state}
        return ((one - two) ** 2).mean(), returned[mistake]

    return loss_fn


def told(run: Callable[[], object]) -> list[Any]:
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", fs.RetraceWarning)  # equal steps are drawn again
        run()
    return [each.message for each in caught]


def stepped(loss_fn: Loss, params: Any, state: Any, **options: Any) -> Callable[[], object]:
    """Traces a step."""
    carry = fs.init_carry(params, state, TX)
    return lambda: jax.eval_shape(fs.with_optimizer(loss_fn, TX, **options), carry, X)


def in_parts(loss_fn: Loss, params: Any, state: Any) -> Callable[[], object]:
    """With microbatches."""
    return stepped(loss_fn, params, state, microbatches=2)


def scanned(loss_fn: Loss, params: Any, state: Any) -> Callable[[], object]:
    """Several steps in one program, guarded and averaged."""
    step = fs.scan_steps(fs.with_ema(fs.skip_nonfinite(fs.with_optimizer(loss_fn, TX)), decay=0.9))
    carry = fs.init_carry(params, state | {"ema": params}, TX)
    return lambda: jax.eval_shape(step, carry, jnp.stack([X, X]))


def eager(loss_fn: Loss, params: Any, state: Any) -> Callable[[], object]:
    """Not traced at all."""
    return lambda: fs.value_and_grad(loss_fn)(params, state, X)


def per_example(loss_fn: Loss, params: Any, state: Any) -> Callable[[], object]:
    """Each example's own gradients."""
    grads_of = fs.vmap_stateful(fs.value_and_grad(loss_fn), axis_name=None, in_axes=None, axis_size=2, split_rngs=False)
    return lambda: jax.eval_shape(grads_of, params, state, X)


WAYS = {"step": stepped, "microbatches": in_parts, "scan": scanned, "eager": eager, "examples": per_example}

WAY = pytest.mark.parametrize("way", WAYS)
FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


@WAY
@FUNCTION
def test_a_right_program_is_silent(name: str, way: str) -> None:
    fn, params, state = FUNCTIONS[name]
    assert told(WAYS[way](twice(fn), params, state)) == []


@WAY
@FUNCTION
@pytest.mark.parametrize("mistake", ["dropped", "stale", "keys", "forked"])
def test_each_mistake_is_told_once_with_every_leaf(name: str, way: str, mistake: str) -> None:
    fn, params, state = FUNCTIONS[name]
    (warning,) = told(WAYS[way](twice(fn, mistake), params, state))
    assert isinstance(warning, fs.DroppedStateWarning)
    moved = {line.split(":")[0] for line in warning.leaves}
    after = fn(params, state, X)[1]
    changed = [
        f"state{jax.tree_util.keystr(path)}"
        for (path, leaf), new in zip(
            jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(after), strict=True
        )
        if leaf is not new and (mistake != "keys" or path[0].key in KEYS)
    ]
    assert moved == {*changed}
    assert ("which is kept" in warning.leaves[0]) == (mistake == "forked")


@KINDS
def test_devices_of_a_mesh(kind: AxisType) -> None:
    fn, params, state = linen(Dropping("data"), lambda fn: fs.with_rngs(fn, axis_name="data"))
    mesh = line(kind, 2)

    def run(mistake: str) -> Any:
        step = fs.with_optimizer(twice(fn, mistake), TX, axis_name="data")
        each: Any = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
        carry = fs.init_carry(params, state, TX, sharding=NamedSharding(mesh, P()))
        return told(lambda: jax.eval_shape(each, carry, jax.device_put(X, NamedSharding(mesh, P("data")))))

    assert [len(run(mistake)) for mistake in ("none", "dropped", "stale", "keys", "forked")] == [0, 1, 1, 1, 1]


# Silent, where it is meant


FN, PARAMS, STATE = FUNCTIONS["with_rngs"]
READ = fs.with_mutable(Dropping(None), mutable=False)
BY_HAND: Any = fs.with_mutable(Dropping(None))
SOWING = fs.with_mutable(Sowing())
EMPTY: dict[str, Any] = {"intermediates": {}, "losses": {}}
OWN = {name: tree for name, tree in STATE.items() if name != "rngs"}


def branches(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Each branch calls; one of them runs."""
    out, state = jax.lax.cond(batch.sum() > 0, lambda: FN(params, state, batch), lambda: FN(params, state, -batch))
    return out.mean(), state


def checkpointed(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Forward is traced again for the backward pass."""
    out, state = jax.checkpoint(FN)(params, state, batch)
    return out.mean(), state


def copied(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """A call whose new state is dropped on purpose, as the page says it."""
    rival, _ = FN(params, jax.tree.map(jnp.copy, state), batch + 1)
    out, state = FN(params, state, batch)
    return ((out - rival) ** 2).mean(), state


def read(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """A call that only reads beside one that writes."""
    teacher, _ = READ(params, state, batch, train=False)
    out, state = FN(params, state, batch)
    return ((out - teacher) ** 2).mean(), state


def evaluating(fn: Any) -> Loss:
    """A call that is given the same keys, and draws from none."""

    def evaluated(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fs.UntouchedStateWarning)
            teacher, _ = fn(params, state, batch, train=False)
            out, state = fn(params, state, batch)
        return ((out - teacher) ** 2).mean(), state

    return evaluated


def averaged(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Two views of one state, joined again."""
    one, left = BY_HAND(params, state, batch, rngs={"dropout": KEY})
    two, right = BY_HAND(params, state, batch + 1, rngs={"dropout": jax.random.fold_in(KEY, 1)})
    return ((one - two) ** 2).mean(), jax.tree.map(lambda a, b: (a + b) / 2, left, right)


def handed_out(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """What was written is in aux."""
    out, new_state = BY_HAND(params, state, batch, rngs={"dropout": KEY})
    return (out.mean(), new_state["batch_stats"]), state


def another_models(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The state of a rival, which is a closure or a further argument, is not this loss's to carry."""
    rival, _ = FN(PARAMS, STATE, batch)
    again, _ = FN(PARAMS, STATE | fs.rng_state(dropout=jax.random.key(9)), batch)
    out, state = FN(params, state, batch)
    return ((out - rival) ** 2).mean() + again.mean(), state


def either(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """One of two calls runs, so one key is for both."""
    options = {"rngs": {"dropout": jax.random.fold_in(KEY, batch.sum().astype(jnp.int32))}}
    calls = (lambda x=each: BY_HAND(params, state, x, **options) for each in (batch, -batch))
    out, state = jax.lax.cond(batch.sum() > 0, *calls)
    return out.mean(), state


def reading_first(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Two calls with one key, of which the first draws nothing."""
    options = {"rngs": {"dropout": jax.random.fold_in(KEY, batch.sum().astype(jnp.int32))}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fs.UntouchedStateWarning)
        teacher, state = BY_HAND(params, state, batch, train=False, **options)
        out, state = BY_HAND(params, state, batch, **options)
    return ((out - teacher) ** 2).mean(), state


def by_keyword(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """The call of a gradient function that names its arguments."""
    grad_fn: Any = fs.value_and_grad(taught)
    (loss, _), state = grad_fn(params, state=state, batch=batch)
    return loss, state


def emptied(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Takes what was sown out of the state."""
    out, new_state = SOWING(params, state, batch)
    return out.mean() + new_state["losses"]["l2"][0], new_state | EMPTY


def taught(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """One call."""
    out, state = FN(params, state, batch)
    return out.mean(), state


MEANT = {fn.__name__: fn for fn in (branches, checkpointed, copied, read, evaluating(FN), another_models, by_keyword)}
MEANT_BY_HAND = {fn.__name__: fn for fn in (averaged, handed_out, either, reading_first)}


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_is_silent(name: str) -> None:
    assert told(stepped(MEANT[name], PARAMS, STATE)) == []


@pytest.mark.parametrize("name", MEANT_BY_HAND)
def test_what_is_joined_or_handed_out_is_silent(name: str) -> None:
    assert told(stepped(MEANT_BY_HAND[name], PARAMS, OWN, has_aux=name == "handed_out")) == []


@pytest.mark.parametrize("name", ["layers", "from_nnx"])
def test_layers_that_hand_on_what_they_did_not_write_are_not_blamed(name: str) -> None:
    fn, params, state = FUNCTIONS[name]
    assert told(stepped(evaluating(fn), params, state)) == []


@needs_jit
def test_leaves_that_a_call_adds_are_not_the_losss_to_carry() -> None:
    params, state = fs.split_params(Sowing().init(KEY, X))
    assert told(stepped(emptied, params, state | EMPTY)) == []


def test_a_line_search_evaluates_the_loss_again_in_silence() -> None:
    tx = optax.lbfgs()
    carry = fs.init_carry(PARAMS, STATE, tx)
    assert told(lambda: jax.eval_shape(fs.with_optimizer(twice(FN), tx), carry, X)) == []


def test_a_copy_costs_nothing() -> None:
    def dropped(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        rival, _ = FN(params, state, batch + 1)
        out, state = FN(params, state, batch)
        return ((out - rival) ** 2).mean(), state

    def hlo(loss_fn: Loss) -> str:
        step = fs.jit_step(fs.with_optimizer(loss_fn, TX), donate=False)
        text: str = step.lower(fs.init_carry(PARAMS, STATE, TX), X).as_text()
        return text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fs.DroppedStateWarning)
        assert hlo(copied).replace("copied", "dropped") == hlo(dropped)


# Keys by hand


def by_hand(other: Any, **options: Any) -> Callable[[], object]:
    """A loss of two calls, the second with other keys or options."""

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        key = jax.random.fold_in(KEY, batch.sum().astype(jnp.int32))
        one, state = BY_HAND(params, state, batch, rngs={"dropout": key})
        two, state = BY_HAND(params, state, batch, rngs={"dropout": other(key)}, **options)
        return ((one - two) ** 2).mean(), state

    return stepped(loss_fn, PARAMS, OWN)


@pytest.mark.filterwarnings("ignore::flaxsplit.UntouchedStateWarning")
def test_one_key_for_two_calls() -> None:
    (warning,) = told(by_hand(lambda key: key))
    (leaf,) = warning.leaves
    assert leaf.startswith("rngs['dropout']: drawn from by Dropping at test_linear.py:")
    assert told(by_hand(lambda key: jax.random.split(key)[0])) == []
    untouched = told(by_hand(lambda key: key, train=False))
    assert {type(each) for each in untouched} == {fs.UntouchedStateWarning}


# What it says


def dropping(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Throws the new state away."""
    out, _ = FN(params, state, batch)
    return out.mean(), state


def dropping_by_name(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Throws the new state away, of a call that names what it gives."""
    out, _ = FN(params, state, x=batch)
    return out.mean(), state


def forking(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Gives two calls the same state."""
    first, _ = FN(params, state, batch)
    second, state = FN(params, state, batch + 1)
    return ((first - second) ** 2).mean(), state


def dropping_twice(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Throws two new states away."""
    first, _ = FN(params, state, batch)
    second, _ = FN(params, state, batch + 1)
    return ((first - second) ** 2).mean(), state


def forking_twice(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Gives three calls the same state."""
    first, _ = FN(params, state, batch)
    second, _ = FN(params, state, batch + 1)
    third, state = FN(params, state, batch + 2)
    return ((first - second) ** 2 + third).mean(), state


def drawing_twice(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Gives three calls the same key: the second is the first one too many."""
    rngs = {"dropout": jax.random.fold_in(KEY, batch.sum().astype(jnp.int32))}
    first, state = BY_HAND(params, state, batch, rngs=rngs)
    second, state = BY_HAND(params, state, batch + 1, rngs=rngs)
    third, state = BY_HAND(params, state, batch + 2, rngs=rngs)
    return ((first - second) ** 2 + third).mean(), state


def line_in(fn: Any, offset: int) -> str:
    """Where a line of a function stands."""
    return f"test_linear.py:{fn.__code__.co_firstlineno + offset}"


def test_an_update_thrown_away() -> None:
    (warning,) = told(stepped(dropping, PARAMS, STATE))
    at = line_in(dropping, 2)
    assert str(warning) == whole(
        f"""
        value_and_grad(loss_fn): the loss must return the state that its last call gave
          got:
            state['batch_stats']['BatchNorm_0']['mean']: written by Dropping at {at}, returned as it was before
            state['batch_stats']['BatchNorm_0']['var']: written by Dropping at {at}, returned as it was before
            state['rngs']['dropout']: drawn from by Dropping at {at}, returned as it was before
          likely cause: the new state of the call was thrown away (`out, _ = fn(...)`), or the old one was returned
          fix: out, state = fn(params, state, x); return loss, state{ON_PURPOSE}
        """
    )


def test_one_state_for_two_calls() -> None:
    (warning,) = told(stepped(forking, PARAMS, STATE))
    lost, kept = line_in(forking, 2), line_in(forking, 3)
    also = f"and by Dropping at {kept}, which is kept"
    assert str(warning) == whole(
        f"""
        value_and_grad(loss_fn): each call must be given the state that the call before it gave
          got:
            state['batch_stats']['BatchNorm_0']['mean']: written by Dropping at {lost}, {also}
            state['batch_stats']['BatchNorm_0']['var']: written by Dropping at {lost}, {also}
            state['rngs']['dropout']: drawn from by Dropping at {lost}, {also}
          likely cause: two calls were given the same state, so that one update is lost and both draw the same masks
          fix: first, state = fn(params, state, x); second, state = fn(params, state, y){ON_PURPOSE}
        """
    )


def test_one_key_by_hand_for_two_calls() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        rngs = {"dropout": KEY}
        one, state = BY_HAND(params, state, batch, rngs=rngs)
        two, state = BY_HAND(params, state, batch, rngs=rngs)
        return ((one - two) ** 2).mean(), state

    (warning,) = told(stepped(loss_fn, PARAMS, OWN))
    one, two = line_in(loss_fn, 2), line_in(loss_fn, 3)
    assert str(warning) == whole(
        f"""
        value_and_grad(loss_fn): no key may be drawn from twice
          got:
            rngs['dropout']: drawn from by Dropping at {one}, and by Dropping at {two}
          likely cause: two calls were given the same rngs, so that their masks are the same
          fix: key, other = jax.random.split(key), one for each call; or with_rngs(fn), which draws anew at each call
        """
    )


def test_it_points_at_the_users_own_line_and_is_shown_once_for_each() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            stepped(dropping, PARAMS, STATE)()
            stepped(forking, PARAMS, STATE)()
    assert [each.filename for each in caught] == [__file__] * 2
    first = [fn.__code__.co_firstlineno for fn in (dropping, forking)]
    assert [each.lineno for each in caught] == [line + 2 for line in first]


FIRST = [(dropping_twice, 2), (dropping_by_name, 2), (forking_twice, 2), (drawing_twice, 4)]


@pytest.mark.parametrize(("loss_fn", "line"), FIRST)
def test_of_several_it_points_at_the_first(loss_fn: Any, line: int) -> None:
    state = STATE if loss_fn is not drawing_twice else OWN
    with pytest.warns(fs.DroppedStateWarning) as caught:
        stepped(loss_fn, PARAMS, state)()
    assert [each.lineno for each in caught] == [loss_fn.__code__.co_firstlineno + line]


# Nothing stays behind


def test_an_exception_in_a_loss_leaves_nothing() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        FN(params, state, batch)
        raise KeyError

    with pytest.raises(KeyError):
        stepped(loss_fn, PARAMS, STATE)()
    assert _linear._WATCH.get() is None  # pyright: ignore[reportPrivateUsage]
    assert told(lambda: FN(PARAMS, STATE, X)) == []


def test_another_thread_is_another_loss() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        thread = threading.Thread(target=lambda: FN(PARAMS, STATE, X))
        thread.start()
        thread.join()
        out, state = FN(params, state, batch)
        return out.mean(), state

    assert told(stepped(loss_fn, PARAMS, STATE)) == []


def test_no_tracer_leaks() -> None:
    with jax.checking_leaks():
        stepped(branches, PARAMS, STATE)()
        assert len(told(stepped(forking, PARAMS, STATE))) == 1


def test_a_right_loss_is_traced_once_and_a_wrong_one_twice() -> None:
    counts: list[str] = []

    class Counted(nn.Module):
        @nn.compact
        def __call__(self, x: Any, name: str) -> Any:
            counts.append(name)
            return nn.BatchNorm(use_running_average=False)(x)

    fn = fs.with_mutable(Counted())
    params, state = fs.split_params(Counted().init(KEY, X, "init"))
    counts.clear()

    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        _, state = fn(params, state, batch, "right")
        out, _ = fn(params, state, batch, "wrong")
        return out.mean(), state

    assert len(told(stepped(loss_fn, params, state))) == 1
    assert counts == ["right", "wrong", "wrong"]


# Drawn


CALLS = st.sampled_from(["one", "two", "read", "copied"])
MISTAKES = st.sampled_from(["dropped", "stale", "forked", "reused"])


def drawn_loss(model: Model, stack: Stack, calls: str) -> Loss:
    """A loss over the function of a stack: right in several ways, or with a mistake."""
    by_hand = calls == "reused"
    fn = applied(model, replace(stack, functions=("vmap",) * ("vmap" in stack.functions)) if by_hand else stack)
    only_reads = applied(model, stack, mutable=False)

    def loss_fn(params: Any, state: Any, batch: Any, weight: Any = 1.0) -> tuple[Any, Any]:
        keys = {"rngs": {"dropout": jax.random.fold_in(KEY, 1)}} if by_hand else {}
        one, first = fn(params, state, batch[0], **keys)
        loss = weight * error(model, one, batch[1])
        if calls == "one":
            return loss, first
        if calls == "read" and not model.cached and not model.has(Remember):  # these write in either mode
            two, second = only_reads(params, first, batch[0], train=False)
            second = {**first, "rngs": second["rngs"]} if "rngs" in first else first
        else:
            again = {"forked": state, "copied": jax.tree.map(jnp.copy, first)}.get(calls, first)
            two, second = fn(params, again, batch[0], **keys)
        returned = {"stale": first, "copied": first, "dropped": state}.get(calls, second)
        return loss + error(model, two, batch[1]), returned

    return loss_fn


def traced(model: Model, stack: Stack, calls: str, several: bool) -> None:
    """Traces the step of a whole stack around such a loss; nothing is compiled, not even what makes the variables."""
    unused = {"ema"} if "ema" not in stack.steps else set[str]()
    unused |= {"rngs"} if calls == "reused" else set[str]()

    def made() -> Any:
        params, state = begun(model, stack)
        carry = fs.init_carry(params, {name: tree for name, tree in state.items() if name not in unused}, TX)
        batch = model.batch(0)
        return carry, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch) if several else batch

    step = wrapped(stack, drawn_loss(model, stack, calls), TX, 1)
    jax.eval_shape(fs.scan_steps(step) if several else step, *jax.eval_shape(made))


@some.fuzzed(model=some.models(), data=st.data(), calls=CALLS, several=st.booleans())
def test_a_drawn_right_program_warns_of_nothing(model: Model, data: st.DataObject, calls: str, several: bool) -> None:
    """Over every layer and stack: calls one after the other, one that only reads, one whose update is not kept."""
    stack = data.draw(some.stacks(model, microbatches=[1, 2]))
    assert told(lambda: traced(model, stack, calls, several)) == []


@some.fuzzed(model=some.models(), data=st.data(), mistake=MISTAKES, several=st.booleans())
def test_each_planted_mistake_is_found(model: Model, data: st.DataObject, mistake: str, several: bool) -> None:
    """Over every layer and stack; a model that keeps nothing and draws nothing has nothing to lose."""
    stack = data.draw(some.stacks(model, microbatches=[1, 2]))
    warned = told(lambda: traced(model, stack, mistake, several))
    keeps = model.has(BatchNorm) or model.has(Remember) or model.has(Dropout) or model.cached
    is_mistake = model.has(Dropout) if mistake == "reused" else keeps
    assert [type(each) for each in warned] == [fs.DroppedStateWarning] * is_mistake


# Params that no gradient reaches


def outside(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
    """Uses the params of a closure."""
    del params
    out, state = FN(PARAMS, state, batch)
    return out.mean(), state


@pytest.mark.parametrize("way", ["step", "microbatches", "scan", "eager"])
def test_params_that_come_in_by_a_closure(way: str) -> None:
    (warning,) = told(WAYS[way](outside, {"w": jnp.ones(2)}, STATE))
    assert isinstance(warning, fs.UntouchedStateWarning)
    assert str(warning) == whole(
        """
        value_and_grad(loss_fn): the loss must be computed from the params that loss_fn is given
          got:
            params['w']: the gradient is zero
          likely cause: loss_fn uses params from outside of it, or jax.lax.stop_gradient is around them
          fix: def loss_fn(params, state, batch): out, state = fn(params, state, batch); ...
        """
    )


def test_one_param_that_reaches_the_loss_is_enough() -> None:
    def loss_fn(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return (jax.lax.stop_gradient(params["a"]) * batch).sum() * params["b"], state

    def nothing(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        return batch.sum(), state

    assert told(stepped(loss_fn, {"a": jnp.ones(3), "b": jnp.ones(())}, {})) == []
    assert told(stepped(nothing, {}, {})) == []


# An average that nothing keeps


def test_an_average_without_with_ema() -> None:
    carry = fs.init_carry(PARAMS, STATE | {"ema": PARAMS}, TX)
    step = fs.with_optimizer(twice(FN), TX)
    (warning,) = told(lambda: jax.eval_shape(step, carry, X))
    assert isinstance(warning, fs.UntouchedStateWarning)
    assert str(warning) == whole(
        """
        with_optimizer(loss_fn, tx): state['ema'] must be averaged, by with_ema around the step
          got:
            state['ema']: stays as it is
          likely cause: with_ema was forgotten, or the tree is of your own
          fix: with_ema(with_optimizer(loss_fn, tx), decay=0.999); or state['extra'] for a tree of your own
        """
    )
    averaged = fs.with_ema(step, decay=0.999)
    for right in (averaged, fs.with_ema(fs.skip_nonfinite(fs.jit_step(step)), decay=0.9)):
        assert told(lambda right=right: jax.eval_shape(right, carry, X)) == []  # type: ignore[misc]

    def failing(carry: Any, batch: Any) -> Any:
        raise KeyError

    with pytest.raises(KeyError):
        fs.with_ema(failing, decay=0.9)(carry, X)
    assert len(told(lambda: step(carry, X))) == 1, "an exception leaves nothing"
