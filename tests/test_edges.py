"""Where a condition turns: each of these was written because a changed package had passed all the other tests."""

import contextlib
import inspect
import re
import time
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flaxsplit as fs
from flaxsplit import _upstream
from flaxsplit._describe import differences, strong
from flaxsplit._wraps import wraps

from .flags import needs_jit, needs_x32
from .nnx_models import NEW

TX = optax.sgd(0.5)


@pytest.mark.parametrize(("names", "shown"), [("abc", "3: 'a', 'b', 'c'"), ("abcd", "4: 'a', 'b', 'c', ...")])
def test_dots_stand_for_at_least_one_param(names: str, shown: str) -> None:
    with pytest.raises(fs.CollectionError) as caught:
        fs.split_params({"params": dict.fromkeys(names, 1.0)}, trainable="zz*")
    assert caught.value.leaves == (f"'zz*' matches none of {shown}",)


def test_the_whole_tree_is_no_branch_that_a_glob_may_have_meant() -> None:
    with pytest.raises(fs.CollectionError) as caught:
        fs.split_params({"params": {"w": 1.0}}, trainable="/a")
    assert caught.value.fix == "a glob on the '/'-joined path: 'head/*'"


@pytest.mark.parametrize(
    ("params", "frozen", "both"),
    [
        ({"w": 1}, {"w": 2}, ["params['w']"]),
        ({"w": {"a": 1}}, {"w": 2}, ["params['w']"]),
        ({"w": 1}, {"w": {"a": 2}}, ["params['w']"]),
    ],
)
def test_a_param_and_a_branch_of_one_name_overlap(params: Any, frozen: Any, both: list[str]) -> None:
    with pytest.raises(fs.CollectionError) as caught:
        fs.merge_state(params, {"params": frozen})
    assert list(caught.value.leaves) == both


def test_an_empty_branch_gives_way_to_a_full_one() -> None:
    full, empty = {"w": {"a": 1}}, dict[str, Any]({"w": {}})
    assert fs.merge_state(empty, {"params": full}) == fs.merge_state(full, {"params": empty}) == {"params": full}


def test_a_uint32_alone_is_no_key() -> None:
    with pytest.raises(fs.SignatureError) as caught:
        fs.rng_state(dropout=jnp.uint32(3))
    assert caught.value.leaves == ("dropout: u32[]",)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("layers", [None, 3])
def test_a_call_draws_the_second_half_and_keeps_the_first(make: Any, layers: int | None) -> None:
    key = make(0)
    pairs = jax.random.split(key)
    if layers:  # one key per layer
        key = jnp.stack([make(i) for i in range(layers)])
        pairs = jnp.stack([jax.random.split(each) for each in key], axis=1)
    fn: Any = fs.with_rngs(lambda params, state, *, rngs: (rngs["noise"], state))
    drawn, state = fn({}, fs.rng_state(noise=key))
    equal = jax.tree.map(lambda a, b: np.asarray(a == b).all(), (state["rngs"]["noise"], drawn), (pairs[0], pairs[1]))
    assert all(equal)
    assert drawn.shape == key.shape


@pytest.mark.parametrize("stack", [(3,), (2, 3)])
def test_stacked_keys_are_drawn_per_place_in_their_own_order(stack: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), stack)
    fn: Any = fs.with_rngs(lambda params, state, x, *, rngs: (rngs["noise"], state), axis_name="i")
    drawn, _ = jax.vmap(fn, (None, None, 0), (0, None), axis_name="i")({}, fs.rng_state(noise=keys), jnp.arange(2))
    assert drawn.shape == (2, *stack)
    for place in range(2):
        for at in np.ndindex(*stack):
            assert drawn[place][at] == jax.random.fold_in(jax.random.split(keys[at])[1], place)


@pytest.mark.parametrize(("decay", "average"), [(0, 0.5), (0.0, 0.5), (1, 1.0), (1.0, 1.0)])
def test_an_average_may_follow_at_once_or_never(decay: float, average: float) -> None:
    step = fs.with_ema(fs.with_optimizer(lambda params, state, x: (params["w"] * x, state), TX), decay=decay)
    params = {"w": jnp.ones(())}
    carry, _ = step(fs.init_carry(params, {"ema": params}, TX), jnp.float32(1))
    assert carry.state["ema"]["w"] == average


@needs_jit
def test_a_log_shows_what_was_only_traced_and_adds_up_what_was_spent() -> None:
    def only_traced(x: Any) -> Any:
        return x + 1

    began = time.perf_counter()
    with fs.compile_log() as log:
        for size in (2, 3):
            jax.jit(only_traced).lower(jnp.ones(size, jnp.float32))
        jax.jit(jnp.negative)(np.ones(5, np.float32))
    spent = time.perf_counter() - began
    (row,) = (line for line in str(log).splitlines() if line.endswith("  only_traced"))
    traces, seconds, compiles, compiling, _ = row.split()
    assert (traces, compiles, compiling) == ("2", "0", "0.000")
    assert 0 <= float(seconds) <= spent
    assert max([*log.trace_seconds.values(), *log.compile_seconds.values()]) <= spent


def test_three_layers_are_named_and_the_fourth_is_counted() -> None:
    class Four(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for _ in range(4):
                x = nn.BatchNorm(use_running_average=False)(x)
            return x

    x = jnp.ones((4, 2))
    params, state = fs.split_params(Four().init(jax.random.key(0), x[0]))
    with pytest.raises(fs.UnsyncedStateError) as caught:
        fs.vmap_stateful(fs.with_mutable(Four()))(params, state, x)
    assert caught.value.cause.startswith("BatchNorm_0, BatchNorm_1, BatchNorm_2, ... and 1 more lack axis_name='batch'")


@pytest.mark.parametrize(("axis_name", "named"), [("lane", "'lane'"), (None, "'batch'")])
def test_the_mean_that_is_missing_is_over_the_axis_there_is(axis_name: str | None, named: str) -> None:
    fn: Any = fs.vmap_stateful(lambda params, state, x: (x, {"seen": {"last": x}}), axis_name=axis_name)
    with pytest.raises(fs.UnsyncedStateError) as caught:
        fn({}, {"seen": {"last": jnp.zeros(())}}, jnp.arange(3.0))
    assert caught.value.fix.startswith(f"jax.lax.pmean(value, {named}) there")


def test_twelve_leaves_are_listed_and_the_thirteenth_is_counted() -> None:
    for count in (12, 13):
        strange: Any = {f"k{i:02}": 0 for i in range(count)}
        with pytest.raises(fs.SignatureError) as caught:
            fs.rng_state(**strange)
        assert len(caught.value.leaves) == count
        assert ("... and" in str(caught.value)) == ("... and 1 more" in str(caught.value)) == (count == 13)
        assert "k11" in str(caught.value)
        assert "k12" not in str(caught.value)


def test_a_list_that_ends_too_soon_lacks_its_last_leaf() -> None:
    first, second = jnp.float32(1), jnp.ones(2, jnp.float32)
    with pytest.raises(fs.CollectionError) as caught:
        fs.adopt_carry({"w": [first]}, {"w": (first, second)})
    assert caught.value.leaves == ("carry['w'][1]: f32[2] -> absent",)


def test_of_two_strange_collections_the_first_is_told_about() -> None:
    fn = fs.with_mutable(nn.Dense(1), mutable=["zzzz", "yyyy"])
    with pytest.raises(fs.CollectionError) as caught:
        fn({}, {"batch_stats": {}}, jnp.ones(1))
    assert caught.value.fix == "with_mutable(fn, capture='zzzz'), or state | {'zzzz': ...}"


def test_no_lane_at_all_is_a_size() -> None:
    fn: Any = fs.vmap_stateful(lambda params, state, x: (x.sum(), state))
    out, _ = fn({}, {}, jnp.ones((0, 3)))
    assert out.shape == (0,)


@needs_jit
def test_what_has_no_signature_is_counted_too() -> None:
    jitted = jax.jit(fs.assert_max_traces(dict))
    jitted(a=jnp.ones(2, jnp.float32))
    with pytest.raises(fs.RetraceError) as caught:
        jitted(a=jnp.ones(3, jnp.float32))
    assert caught.value.leaves == ("a: f32[2] -> f32[3]",)


def test_a_wrong_call_is_left_to_the_function() -> None:
    def one(x: Any) -> Any:
        return x

    counted: Any = fs.assert_max_traces(one)
    with pytest.raises(TypeError, match=r"one\(\) takes 1 positional argument but 2 were given"):
        jax.jit(counted)(1.0, 2.0)


@jax.tree_util.register_pytree_node_class
class Tagged:
    """A leaf and a word beside it that is part of the structure."""

    def __init__(self, leaf: Any, word: str) -> None:
        self.leaf, self.word = leaf, word

    def tree_flatten(self) -> tuple[tuple[Any], str]:
        return (self.leaf,), self.word

    @classmethod
    def tree_unflatten(cls, word: str, leaves: tuple[Any]) -> "Tagged":
        return cls(leaves[0], word)


@needs_jit
def test_what_a_node_keeps_beside_its_children_is_compared() -> None:
    def leaf_of(tagged: Tagged) -> Any:
        return tagged.leaf

    jitted = jax.jit(fs.assert_max_traces(leaf_of))
    jitted(Tagged(jnp.ones(2), "a"))
    with pytest.raises(fs.RetraceError) as caught:
        jitted(Tagged(jnp.ones(2), "b"))
    assert caught.value.leaves == ("tagged: 'a' -> 'b'",)


def test_a_leaf_and_a_node_of_one_name_differ() -> None:
    leaf: Any = type("Tagged", (), {})()
    (found,) = differences({"at": leaf}, {"at": Tagged(jnp.ones(2), "a")}, "tree")
    assert found.path == "tree['at']"


@pytest.mark.parametrize("leaf", ["abc", np.array("abc"), jax.random.key(0), jnp.ones(2), None], ids=str)
def test_what_has_no_weak_type_stays_the_very_same(leaf: Any) -> None:
    assert strong(leaf) is leaf


@pytest.mark.parametrize("leaf", [jnp.asarray(1.0), 1.0, np.float32(1)], ids=repr)
def test_a_weak_type_goes_and_numbers_become_arrays(leaf: Any) -> None:
    assert isinstance(strong(leaf), jax.Array)
    assert not strong(leaf).weak_type
    assert strong(leaf) == 1


def test_a_function_is_of_the_module_that_it_wraps() -> None:
    def fn(params: Any, state: Any) -> Any:
        return params, state

    assert fs.vmap_stateful(fn).__module__ == fn.__module__ == __name__


@pytest.mark.parametrize("signature", ["no signature", None])
def test_what_cannot_say_its_signature_is_wrapped_without(signature: Any) -> None:
    class Fn:
        __signature__ = signature  # a TypeError in inspect

        def __call__(self, params: Any, state: Any) -> Any:
            return params, state

    fn: Any = Fn() if signature else max  # a ValueError, as for some builtins

    def wrapper(*args: Any) -> Any:
        return args

    wrapped = wraps(fn, ("params",))(wrapper)
    assert not hasattr(wrapped, "__signature__")
    assert wrapped(1) == (1,)


@pytest.mark.parametrize("wrong", [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nn.Dense(3)], ids=["nnx", "linen"])
def test_a_module_of_either_api_is_no_function(wrong: Any) -> None:
    with pytest.raises(fs.SignatureError) as caught:
        fs.vmap_stateful(wrong)
    assert caught.value.required == "fn must be a function, and no module or class"


class Writer(nnx.Module):
    """Writes to two params in a call."""

    def __init__(self) -> None:
        self.first, self.second = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones(()))

    def __call__(self, x: Any) -> Any:
        for param in (self.first, self.second):
            if NEW:
                param[...] += 1
            else:
                param.value += 1
        return x


class Outer(nnx.Module):
    """Has its params one level down."""

    def __init__(self) -> None:
        self.inner = Writer()

    def __call__(self, x: Any) -> Any:
        return self.inner(x)


def test_of_two_params_that_a_call_writes_both_are_told_how_to_be_state() -> None:
    fn, params, state = fs.from_nnx(Outer())
    with pytest.raises(fs.CollectionError) as caught:
        fn(params, state, 1.0)
    assert caught.value.fix.endswith("not in ['inner/first', 'inner/second'])")


def test_filters_that_are_empty_choose_nothing_and_a_number_is_none() -> None:
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    empty: Any
    for empty in ([], (), None, False):
        with pytest.raises(fs.CollectionError) as caught:
            fs.from_nnx(linear, trainable=empty)
        assert caught.value.required == "the filter must choose at least one variable"
    number: Any = 0
    with pytest.raises(fs.SignatureError):
        fs.from_nnx(linear, trainable=number)
    for everything in (..., True, nnx.Param):
        assert sorted(fs.from_nnx(linear, trainable=everything)[1]) == ["bias", "kernel"]


def test_a_module_owns_what_is_written_to_it() -> None:
    linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    _, params, state = fs.from_nnx(linear)
    given = jax.tree.map(jnp.zeros_like, params)
    fs.to_nnx(linear, given, state)
    for leaf in jax.tree.leaves(given):
        leaf.delete()
    assert not linear(jnp.ones(2)).any()


@needs_x32
def test_a_number_is_written_where_a_scalar_is_due() -> None:
    outer = Outer()
    fs.to_nnx(outer, {"inner": {"first": 2.0, "second": np.float32(3)}}, {})
    assert jax.tree.leaves(fs.from_nnx(outer)[1]) == [2, 3]


class Numbers(nnx.Module):
    """Holds an array and a number of Python."""

    def __init__(self) -> None:
        self.w, self.n = nnx.Param(jnp.zeros(())), nnx.BatchStat(0)


@needs_x32
def test_a_number_is_copied_unless_both_are_pythons_own() -> None:
    module, given = Numbers(), jnp.int32(4)
    fs.to_nnx(module, {"w": 2.0}, {"batch_stats": {"n": given}})
    given.delete()
    w, n = (jax.tree.leaves(each)[0] for each in fs.from_nnx(module)[1:])
    assert isinstance(w, jax.Array)
    assert int(n) == 4
    kept = fs.to_nnx(Numbers(), {"w": 2.0}, {"batch_stats": {"n": 5}})
    assert jax.tree.leaves(fs.from_nnx(kept)[2]) == [5]
    assert type(jax.tree.leaves(fs.from_nnx(kept)[2])[0]) is int


class Model(nn.Module):
    """Has a method beside its call."""

    def __call__(self, x: Any) -> Any:
        return x

    def scaled(self, x: Any, by: Any = 2, *, plus: int = 0) -> Any:
        return x * by + plus


def test_the_method_is_what_runs() -> None:
    for method in ("scaled", Model.scaled):
        out, _ = fs.with_mutable(Model(), method=method)({}, {}, 3, plus=1)
        assert out == 7
    assert fs.with_mutable(Model().apply, method=Model.scaled)({}, {}, 3)[0] == 6


def of_this_form(variables: Any, x: Any, y: Any = 0, *, mutable: Any = False) -> Any:
    return x, variables


@pytest.mark.parametrize(
    ("fn", "form"),
    [
        (fs.with_mutable(Model()), "(params, state, /, x)"),
        (fs.with_mutable(Model(), method=Model.scaled), "(params, state, /, x, by=2, *, plus=0)"),
        (fs.with_mutable(Model(), method="scaled"), "(params, state, /, x, by=2, *, plus=0)"),
        (fs.with_mutable(Model(), method=Model().scaled), "(params, state, /, x, by=2, *, plus=0)"),
        (fs.with_mutable(of_this_form), "(params, state, /, x, y=0, *, mutable=False)"),
    ],
)
def test_leading_arguments_are_replaced_and_no_more(fn: Any, form: str) -> None:
    signature = inspect.signature(fn)
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    assert str(signature.replace(parameters=bare)) == form


def test_one_collection_is_meant_by_a_misspelt_one() -> None:
    fn = fs.with_mutable(nn.Dense(1), mutable="batch_stat")
    with pytest.raises(fs.CollectionError) as caught:
        fn({}, {"batch_stats": {}, "batch_state": {}}, jnp.ones(1))
    assert caught.value.fix.count("'") == 2


def test_what_is_adopted_goes_where_like_says_and_nowhere_else() -> None:
    value, there = np.ones(2, np.float32), jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    free = fs.adopt_carry({"w": value}, {"w": jnp.zeros(2, jnp.float32)})
    abstract = fs.adopt_carry({"w": value}, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})
    told = fs.adopt_carry({"w": value}, {"w": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=there)})
    placed: Any = (free["w"], abstract["w"], told["w"])
    assert [each.committed for each in placed] == [False, False, True]
    assert placed[2].sharding == there


def test_a_step_takes_a_carry_and_the_batch_of_its_loss_and_counts_by_one() -> None:
    def squared(params: Any, state: Any, numbers: Any) -> Any:
        return (params["w"] * numbers) ** 2, state

    step: Any = fs.with_optimizer(squared, TX)
    assert step.__name__ == "squared"
    assert [*inspect.signature(step).parameters] == ["carry", "numbers"]
    carry = fs.init_carry({"w": jnp.float32(1)}, {}, TX)
    for count in range(3):
        assert carry.step == count
        carry, _ = step(carry, jnp.float32(1))


def test_the_first_axis_may_be_counted_from_the_end() -> None:
    fn: Any = fs.vmap_stateful(lambda params, state, x: (x.sum(), state), in_axes=-2)
    out, _ = fn({}, {}, jnp.ones((3, 4)))
    assert out.tolist() == [4, 4, 4]


def test_a_stream_that_is_not_named_is_split() -> None:
    fn: Any = lambda params, state, x, *, rngs: (rngs, state)  # noqa: E731
    rngs = fs.rng_state(dropout=jax.random.key(0), noise=jax.random.key(1))["rngs"]
    out, _ = fs.vmap_stateful(fn, split_rngs={"noise": False})({}, {}, jnp.arange(3), rngs=rngs)
    different = {name: len({tuple(jax.random.key_data(key).tolist()) for key in keys}) for name, keys in out.items()}
    assert different == {"dropout": 3, "noise": 1}


def test_what_was_compiled_and_never_traced_took_no_time_to_trace() -> None:
    log = fs.CompileLog(compiles=Counter(kept=1), compile_seconds={"kept": 0.5})
    assert str(log).split("\n")[1].split() == ["0", "0.000", "1", "0.500", "kept"]


@pytest.mark.skipif(not hasattr(jax.monitoring, "unregister_event_duration_listener"), reason="jax < 0.8 keeps them")
def test_a_log_that_is_closed_listens_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[Any] = []
    monkeypatch.setattr(jax.monitoring, "unregister_event_duration_listener", gone.append)
    with fs.compile_log():
        assert not gone
    assert len(gone) == 1


def test_of_two_strange_axes_the_first_is_told_about() -> None:
    axes: Any = {"a": "0", "b": 0.5}
    with pytest.raises(fs.SignatureError) as caught:
        fs.vmap_stateful(lambda params, state, x: (x, state), in_axes=(axes,))({}, {}, dict.fromkeys("ab", jnp.ones(2)))
    assert caught.value.leaves == ("for args[0]: str",)


LAYERS = {"Dense_0": {"w": 1.0}}


@pytest.mark.parametrize(
    ("params", "state", "swapped"),
    [
        ({"batch_stats": LAYERS}, {"Dense_1": {"w": 1.0}}, True),
        ({"params": LAYERS, "cache": LAYERS}, {"Dense_1": {"w": 1.0}}, True),
        ({"cache": LAYERS}, LAYERS, True),
        ({"cache": LAYERS}, {"w": 1.0}, True),
        ({"cache": LAYERS}, {"Dense_1": {"w": 1.0}}, False),  # a submodule may be called so
    ],
)
def test_halves_are_swapped_where_their_names_leave_no_doubt(params: Any, state: Any, swapped: bool) -> None:
    refused = pytest.raises(fs.CollectionError, match="params and state were swapped")
    with refused if swapped else contextlib.nullcontext():
        fs.merge_state(params, state)


@pytest.mark.parametrize("trainable", ["", ["head/*"], ["head/*", ""]])
def test_of_a_module_without_params_nothing_can_be_asked_by_path(trainable: Any) -> None:
    with pytest.raises(fs.CollectionError):
        fs.from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), trainable=trainable)


class _Unpacks:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def unpack(self) -> Any:
        return self.parts


@pytest.mark.parametrize("held", [{}, {"ft_in": 3}, {"ft_in": _Unpacks(1, 2, 3)}, {"ft_in": _Unpacks([], [])}])
def test_a_scan_that_jax_describes_anew_says_nothing(held: Any) -> None:
    assert _upstream.scan_sizes(held) is None


def test_seconds_of_a_log_begin_at_none() -> None:
    begun = time.perf_counter()
    with fs.compile_log() as log:
        jax.jit(lambda x: jax.lax.add(x, x))(np.ones(3))  # traces no other function, whose time would count twice
    assert sum(log.trace_seconds.values()) + sum(log.compile_seconds.values()) < time.perf_counter() - begun


class Raising(nn.Module):
    """Raises what it is told."""

    message: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        raise ValueError(self.message)


@pytest.mark.parametrize(
    "message",
    ["no luck", "passed to vmap", "a shard", "of shape (3,)", "Incompatible shapes for broadcasting: (2,), (5,)"],
)
def test_an_error_of_the_users_own_stays_as_it_is(message: str) -> None:
    apply: Any = fs.with_mutable(Raising(message))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        fs.value_and_grad(apply)({"w": jnp.ones(3)}, {"perturbations": {"x": jnp.ones(3)}}, jnp.ones(3))
    assert type(caught.value) is ValueError
