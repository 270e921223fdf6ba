"""Run it many times at once: a stateful function per example becomes one over the batch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
from jax.custom_batching import custom_vmap

from ._axes import check_axis_name, is_bound
from ._checks import check_count, checked, is_function, two_of
from ._describe import describe, differences, keyed_leaves, same_leaves, wraps
from ._refusals.apply import RNGS
from ._refusals.lanes import (
    AXES,
    BOUND,
    COLLECTIONS,
    IN_AXES,
    NO_COLLECTION,
    NO_STREAM,
    SIZES,
    SPLIT_RNGS,
    STATE_AXES,
    UNSYNCED,
    VMAP_FN,
)
from ._rngs import are_keys, draw, split_key
from ._split import check_halves
from ._types import Axes, State, StatefulT, Tree
from ._upstream import is_about_out_axes


@checked
def vmap_stateful(
    fn: StatefulT,
    *,
    in_axes: Axes = 0,
    out_axes: Any = 0,
    axis_name: str | None = "batch",
    params_axes: Any = None,
    state_axes: Mapping[str, Any] | None = None,
    split_rngs: bool | Mapping[str, bool] = True,
    axis_size: int | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> StatefulT:
    """Maps a stateful function over its `*args`; state that no axis is given for goes in and comes out unbatched.

    Law: with a model that syncs over `axis_name`, equals the same model, without it, on the whole batch.
    Equals `jax.vmap(fn, in_axes=(None, None, 0, ...), out_axes=(0, None), axis_name="batch")` where there are no rngs.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> model = nn.BatchNorm(use_running_average=False, axis_name="batch")
    >>> x = jax.numpy.ones((8, 3))
    >>> params, state = fs.split_params(model.init(jax.random.key(0), x[0]))
    >>> out, state = fs.vmap_stateful(fs.with_mutable(model))(params, state, x)
    >>> out.shape, state["batch_stats"]["mean"].shape
    ((8, 3), (3,))

    Args:
        fn: a stateful function over one example.
        in_axes: as in `jax.vmap`, for `*args` alone. Keyword arguments are not mapped.
        out_axes: as in `jax.vmap`, for `out` alone.
        axis_name: what collectives such as `nn.BatchNorm(axis_name=...)` call the mapped axis.
        params_axes: axes of the params, for ensembles; shared by default.
        state_axes: `{collection: axes}`, as `variable_axes` of `nn.vmap`; what is not named is shared.
        split_rngs: whether lanes draw different keys, for all streams or by stream.
        axis_size: the number of lanes, where no argument tells.
        spmd_axis_name: as in `jax.vmap`.

    Returns:
        A stateful function over the batch.

    Raises:
        UnsyncedStateError: a shared leaf came out different per lane; names it.
        SignatureError: batch sizes differ, nothing is mapped, or `axis_name` is bound already.
        CollectionError: `state_axes` or `split_rngs` names a collection or stream that is not there.

    As `jax.vmap`, but it knows params, state and rngs apart.
    """
    VMAP_FN.unless(is_function(fn), fn=fn)
    _check_options(axis_name, state_axes, split_rngs, axis_size, spmd_axis_name)

    @wraps(fn)
    def mapped(params: Tree, state: Tree, /, *args: Any, rngs: Any = None, **kwargs: Any) -> tuple[Any, State]:
        check_halves("vmap_stateful(fn)", params, state)
        BOUND.unless(not is_bound(axis_name), _bound_line(axis_name), name=axis_name)
        RNGS.unless(rngs is None or are_keys(rngs), "vmap_stateful(fn)", rngs)
        axes, arg_axes = _axes_of(state, state_axes), _per_argument(in_axes, args)
        size = axis_size or _size_of(params, params_axes, state, axes, args, arg_axes)
        streams = _streams_of(state, axes, rngs, split_rngs, size)
        rest = {name: tree for name, tree in state.items() if name not in streams.held}
        rest_axes = {name: axes[name] for name in rest}
        run = functools.partial(
            _run,
            (params, rest, streams.keys, *args),
            (params_axes, rest_axes, streams.key_axes, *arg_axes),
            axis_name=axis_name,
            axis_size=size,
            spmd_axis_name=spmd_axis_name,
        )
        lane = functools.partial(_lane, fn, streams, kwargs)
        try:
            out, new_rest = run(lane, (out_axes, rest_axes))
        except ValueError as error:
            differing = _differing(lane, run, rest_axes) if is_about_out_axes(error) else []
            UNSYNCED.instead_of(error, error, differing, axis_name, params_axes is not None)
        return out, new_rest | (streams.advanced if streams.drawn else streams.held)

    return cast(StatefulT, mapped)


class _Streams(NamedTuple):
    """The PRNG streams of one call: those that it is given, and those that the state holds for all lanes.

    Attributes:
        given: whether the call has `rngs=`.
        held: `{'rngs': keys}` of the state, if the lanes share it; else empty.
        advanced: the same as it goes on, once a lane drew from it.
        keys: for each lane, the keys that were given and its own of those that are held.
        key_axes: along which axis, for each of these.
        drawn: filled while tracing, where a lane draws from what is held. With `with_rngs` inside it does.
    """

    given: bool
    held: Tree
    advanced: Tree
    keys: tuple[Any, ...]
    key_axes: tuple[Any, ...]
    drawn: set[str]


def _streams_of(state: Tree, axes: Tree, rngs: Any, split: bool | Mapping[str, bool], size: int) -> _Streams:
    held = {name: state[name] for name in ("rngs",) if name in state and axes[name] is None}
    advanced, own = draw(held.get("rngs", {}))
    keys, key_axes = _lane_keys((rngs or {}, own), split, size)
    return _Streams(rngs is not None, held, {"rngs": advanced}, keys, key_axes, set())


def _lane(
    fn: Callable[..., Any], streams: _Streams, kwargs: Any, params: Any, rest: Tree, keys: Any, *args: Any
) -> tuple[Any, State]:
    """One call of `fn`, with the keys of its lane; the state without them."""
    given, own = keys
    state = {**rest, "rngs": own} if streams.held else rest
    call = {**kwargs, "rngs": given} if streams.given else kwargs
    result = fn(params, state, *args, **call)
    out, new_state = two_of(result, "vmap_stateful(fn)", "fn(params, state, ...) -> (out, new_state)")
    if state.keys() != new_state.keys():
        COLLECTIONS.if_any(map(str, differences(dict(state), dict(new_state), "state")))
    if streams.held and not same_leaves(own, new_state["rngs"]):
        streams.drawn.add("rngs")
    return out, {name: new_state[name] for name in rest}


def _run(operands: Any, in_axes: Any, function: Any, out_axes: Any, **options: Any) -> Any:
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, **options)(*operands)


def _check_options(axis_name: Any, state_axes: Any, split_rngs: Any, axis_size: Any, spmd_axis_name: Any) -> None:
    for option, name in (("axis_name", axis_name), ("spmd_axis_name", spmd_axis_name)):
        if name is not None:
            check_axis_name(f"vmap_stateful({option}=...)", option, name)
    if axis_size is not None:
        check_count("vmap_stateful(axis_size=...)", axis_size)
    STATE_AXES.unless(isinstance(state_axes, Mapping | None), state_axes=state_axes)
    SPLIT_RNGS.unless(isinstance(split_rngs, bool | Mapping), split_rngs=split_rngs)


def _bound_line(axis_name: Any) -> str:
    return f"axis_name: {axis_name!r} is bound by an enclosing vmap, pmap or shard_map"


def _lane_keys(rngs: tuple[Any, ...], split: bool | Mapping[str, bool], size: int) -> tuple[Any, Any]:
    """Gives each lane its own key of every stream that is to be split, and says which have a lane axis."""

    def wanted(name: str) -> bool:
        return split if isinstance(split, bool) else split.get(name, True)

    streams = sorted({name for each in rngs for name in each})
    unknown = [] if isinstance(split, bool) else [name for name in split if name not in streams]
    NO_STREAM.if_any(f"{name!r} is not one of {streams}" for name in unknown)
    keys = [{name: split_key(key, size) if wanted(name) else key for name, key in each.items()} for each in rngs]
    return tuple(keys), tuple({name: 0 if wanted(name) else None for name in each} for each in rngs)


def _axes_of(state: Tree, state_axes: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = (name for name in state_axes or {} if name not in state)
    NO_COLLECTION.if_any(f"{name!r} is not one of {sorted(map(str, state))}" for name in unknown)
    return {name: (state_axes or {}).get(name) for name in state}


def _per_argument(in_axes: Axes, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(in_axes, Sequence):
        return (in_axes,) * len(args)
    IN_AXES.unless(len(in_axes) == len(args), f"in_axes: {len(in_axes)} entries, for {len(args)} arguments")
    return tuple(in_axes)


def _size_of(
    params: Tree, params_axes: Any, state: Tree, axes: Tree, args: tuple[Any, ...], arg_axes: tuple[Any, ...]
) -> int:
    """Finds the one size of all mapped axes; names every leaf where there is none or more than one."""
    operands = {"params": (params, params_axes), "state": (dict(state), axes)}
    operands |= {f"args[{i}]": (arg, arg_axes[i]) for i, arg in enumerate(args)}
    sizes = {
        name + jax.tree_util.keystr(path): (_size_along(leaf, axis), describe(leaf), axis)
        for name, (tree, prefix) in operands.items()
        for (path, leaf), axis in zip(_leaves(tree), _spread(name, prefix, tree), strict=True)
        if axis is not None and leaf is not None
    }
    found = {size for size, _, _ in sizes.values()}
    SIZES.unless(len(found) == 1 and None not in found, sizes)
    return int(found.pop() or 0)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)[0]


def _size_along(leaf: Any, axis: int) -> int | None:
    shape: tuple[int, ...] = getattr(leaf, "shape", ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def _is_none(node: Any) -> bool:
    return node is None


def _spread(name: str, prefix: Any, tree: Any) -> list[Any]:
    """Gives each leaf of a tree the axis that a prefix of the tree says for it."""
    try:
        axes = jax.tree.leaves(jax.tree.broadcast(prefix, tree, is_leaf=_is_none), is_leaf=_is_none)
    except ValueError:
        axes = [prefix]
    wrong = [axis for axis in axes if not _is_axis(axis)]
    AXES.unless(not wrong, name, *map(describe, wrong[:1]))
    return axes


def _is_axis(axis: Any) -> bool:
    return axis is None or (isinstance(axis, int) and not isinstance(axis, bool))


def _differing(lane: Any, run: Any, axes: Tree) -> list[str]:
    """Runs the lanes once more, abstractly, to ask each shared leaf whether it differs per lane."""
    mapped: list[str] = []

    def probed(*args: Any) -> Any:
        _, new_state = lane(*args)
        leaves = keyed_leaves({name: tree for name, tree in new_state.items() if axes[name] is None}, "state")
        return _probe(mapped, list(leaves))(*leaves.values())

    jax.eval_shape(lambda: run(probed, 0))
    return mapped


def _probe(mapped: list[str], paths: list[str]) -> Any:
    """An identity whose batching rule is told which of its arguments differ per lane."""

    @custom_vmap
    def probe(*leaves: Any) -> Any:
        return leaves

    @probe.def_vmap
    def _rule(axis_size: int, in_batched: list[bool], *leaves: Any) -> Any:
        mapped.extend(path for path, batched in zip(paths, in_batched, strict=True) if batched)
        return leaves, tuple(in_batched)

    return probe
