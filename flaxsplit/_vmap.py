"""Run it many times at once: a stateful function per example becomes one over the batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
from jax.custom_batching import custom_vmap

from ._axes import check_axis_name, is_bound
from ._checks import check_count, checked, is_function, two_of
from ._describe import keyed_leaves, same_leaves
from ._lanes import Lanes, axes_by_argument, axes_by_collection, lane_keys, lanes_of
from ._linear import noted
from ._refusals.lanes import BOUND, COLLECTIONS, FORM, SPLIT_RNGS, STATE_AXES, UNSYNCED, VMAP_FN
from ._refusals.upstream import RNGS
from ._rngs import are_keys, draw
from ._split import check_halves
from ._types import Axes, State, StatefulT, Tree
from ._upstream import is_about_out_axes
from ._wraps import wraps


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
    """Maps a stateful function over its `*args`; state without an axis goes in and comes out unbatched.

    Law: with a model that averages over `axis_name`, equals the same model, without it, on the whole batch.
    Equals `jax.vmap(fn, in_axes=(None, None, 0, ...), out_axes=(0, None), axis_name="batch")` if there are no rngs.

    >>> import jax, flax.linen as nn, flaxsplit as fs
    >>> model = nn.BatchNorm(use_running_average=False, axis_name="batch")
    >>> x = jax.numpy.ones((8, 3))
    >>> params, state = fs.split_params(model.init(jax.random.key(0), x[0]))
    >>> out, state = fs.vmap_stateful(fs.with_mutable(model))(params, state, x)
    >>> out.shape, state["batch_stats"]["mean"].shape
    ((8, 3), (3,))

    Args:
        fn: a stateful function over one example.
        in_axes: as in `jax.vmap`, for `*args` only. Keyword arguments are not mapped.
        out_axes: as in `jax.vmap`, for `out` only.
        axis_name: the name of the mapped axis for collectives such as `nn.BatchNorm(axis_name=...)`.
        params_axes: axes of the params, for ensembles; shared by default.
        state_axes: `{collection: axes}`, as `variable_axes` of `nn.vmap`; collections without an axis are shared.
        split_rngs: whether lanes draw different keys, for all streams or by stream.
        axis_size: the number of lanes, if no argument has it; one that has must agree.
        spmd_axis_name: as in `jax.vmap`.

    Returns:
        A stateful function over the batch.

    Raises:
        UnsyncedStateError: a shared leaf came out different per lane; the message names it.
        SignatureError: sizes of mapped axes differ, nothing is mapped, or `axis_name` is bound already.
        CollectionError: `state_axes` or `split_rngs` names a collection or stream that is not there.

    As `jax.vmap`, but it treats params, state and rngs each in its own way.
    """
    VMAP_FN.unless(is_function(fn), fn=fn)
    _check_options(axis_name, state_axes, split_rngs, axis_size, spmd_axis_name)

    @wraps(fn)
    @noted
    def mapped(params: Tree, state: Tree, /, *args: Any, rngs: Any = None, **kwargs: Any) -> tuple[Any, State]:
        check_halves("vmap_stateful(fn)", params, state)
        BOUND.unless(not is_bound(axis_name), axis_name)
        RNGS.unless(rngs is None or are_keys(rngs), "vmap_stateful(fn)", rngs)
        axes, arg_axes = axes_by_collection(state, state_axes), axes_by_argument(in_axes, args)
        operands = {"params": (params, params_axes), "state": (dict(state), axes)}
        operands |= {f"args[{i}]": each for i, each in enumerate(zip(args, arg_axes, strict=True))}
        lanes = lanes_of(operands, axis_size)
        streams = _streams_of(state, axes, rngs, split_rngs, lanes)
        collections = {name: tree for name, tree in state.items() if name not in streams.shared}
        collection_axes = {name: axes[name] for name in collections}
        run = functools.partial(
            _run,
            (params, collections, streams.keys, *args),
            (params_axes, collection_axes, streams.key_axes, *arg_axes),
            axis_name=axis_name,
            axis_size=lanes.number,
            spmd_axis_name=spmd_axis_name,
        )
        lane = functools.partial(_lane, fn, streams, kwargs)
        try:
            out, new_collections = run(lane, (out_axes, collection_axes))
        except ValueError as error:
            differing = _differing(lane, run, collection_axes) if is_about_out_axes(error) else []
            UNSYNCED.instead_of(error, error, differing, axis_name, params_axes is not None)
        return out, new_collections | (streams.advanced if streams.used else streams.shared)

    return cast(StatefulT, mapped)


class _Streams(NamedTuple):
    """The PRNG streams of one call: those that it is given, and those of the state that all lanes share.

    Attributes:
        by_hand: whether the call has `rngs=`.
        shared: `{'rngs': keys}` of the state, if it has no axis; else empty. A lane with `with_rngs` draws from it.
        advanced: the same, as it goes on once a lane drew from it.
        keys: for each lane, its keys of those by hand and of those that are shared.
        key_axes: along which axis, for each of these.
        used: filled while tracing, where a lane draws from what is shared.
    """

    by_hand: bool
    shared: Tree
    advanced: Tree
    keys: tuple[Any, ...]
    key_axes: tuple[Any, ...]
    used: set[str]


def _streams_of(state: Tree, axes: Tree, rngs: Any, split: bool | Mapping[str, bool], lanes: Lanes) -> _Streams:
    shared = {name: state[name] for name in ("rngs",) if name in state and axes[name] is None}
    advanced, own = draw(shared.get("rngs", {}))
    keys, key_axes = lane_keys((rngs or {}, own), split, lanes)
    return _Streams(rngs is not None, shared, {"rngs": advanced}, keys, key_axes, set())


def _lane(
    fn: Callable[..., Any], streams: _Streams, kwargs: Any, params: Any, collections: Tree, keys: Any, *args: Any
) -> tuple[Any, State]:
    """One call of `fn`, with the keys of its lane; the state without those that are shared."""
    by_hand, own = keys
    state = {**collections, "rngs": own} if streams.shared else collections
    options = {**kwargs, "rngs": by_hand} if streams.by_hand else kwargs
    out, new_state = two_of(fn(params, state, *args, **options), "vmap_stateful(fn)", FORM)
    COLLECTIONS.unless(state.keys() == new_state.keys(), state, new_state)
    if streams.shared and not same_leaves(own, new_state["rngs"]):
        streams.used.add("rngs")
    return out, {name: new_state[name] for name in collections}


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
