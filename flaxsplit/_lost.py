"""What the calls of a loss function wrote, and its result does not have.

By identity: a leaf that a call did not write comes back as the very same object. A call that identity suspects is
traced once more: layers under `nn.remat` or `nn.scan` hand on what they did not write as another object, and a key that
is handed over need not be drawn from.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ._context import during
from ._describe import is_numeric, keyed_leaves
from ._errors import SILENT
from ._jaxprs import needed, source
from ._linear import Call
from ._refusals.linear import DROPPED, FORKED, REUSED
from ._types import Tree


class Write(NamedTuple):
    """One leaf of the state that a call took, and gave back as another."""

    call: Call
    path: str
    old: Any
    new: Any

    @property
    def is_key(self) -> bool:
        """Whether it is a key, or how often one was drawn from."""
        return self.path.startswith(("['rngs']", "['rng_counts']"))


class Lost(NamedTuple):
    """A write that the result of the loss function does not have.

    Attributes:
        path: where the leaf is in the result's state.
        write: the write.
        kept: the other call that wrote from the same leaf; None where the loss function returned that leaf itself.
    """

    path: str
    write: Write
    kept: Call | None


def warn_of_lost(calls: Sequence[Call], out: Any, new_state: Tree) -> None:
    """Warns of updates that are lost and of keys that are drawn from twice."""
    lost, reused = [*_lost(calls, out, new_state)], [*_reused(calls)]
    suspects = [each.write.call for each in lost] + [call for _, *pair in reused for call in pair]
    used_up = {id(call): _used_up(call) for call in {id(call): call for call in suspects}.values()}
    lost = [each for each in lost if "state" + each.write.path in used_up[id(each.write.call)]]
    reused = [each for each in reused if all(f"rngs[{each[0]!r}]" in used_up[id(call)] for call in each[1:])]
    if dropped := [each for each in lost if each.kept is None]:
        DROPPED.warn(dropped, at=dropped[0].write.call.line)
    if forked := [each for each in lost if each.kept is not None]:
        FORKED.warn(forked, at=forked[0].write.call.line)
    if reused:
        REUSED.warn(reused, at=reused[0][-1].line)


def _lost(calls: Sequence[Call], out: Any, new_state: Tree) -> Iterator[Lost]:
    """Finds the writes that took a leaf on the way to a returned one, and are not on that way themselves."""
    writes = [write for call in calls for write in _writes(call)]
    made, taken = {id(write.new): write for write in writes}, defaultdict(list)
    for write in writes:
        taken[id(write.old)].append(write)
    used = {id(leaf) for leaf in jax.tree.leaves(out)}
    for path, leaf in keyed_leaves(new_state, "state").items():
        way = _way_to(leaf, made)
        for old, kept in way.items():
            others = [write for write in taken[old] if id(write.new) not in way.keys() | used]
            yield from (Lost(path, write, kept) for write in others if write.call is not kept)


def _way_to(leaf: Any, made: Mapping[int, Write]) -> dict[int, Call | None]:
    """The leaves that a leaf comes from, itself first, each with the call that took it."""
    way: dict[int, Call | None] = {id(leaf): None}
    while (write := made.get(id(leaf))) and id(write.old) not in way:
        leaf, way[id(write.old)] = write.old, write.call
    return way


def _writes(call: Call) -> list[Write]:
    old, new = keyed_leaves(call.args[1]), keyed_leaves(call.new_state)
    return [Write(call, path, old[path], new[path]) for path in old.keys() & new.keys() if old[path] is not new[path]]


def _reused(calls: Sequence[Call]) -> Iterator[tuple[str, Call, Call]]:
    """Finds the calls of one function that were given the same key in `rngs=`."""
    first: dict[Any, Call] = {}
    for call in calls:
        rngs = call.kwargs.get("rngs")
        for stream, key in rngs.items() if isinstance(rngs, Mapping) else ():
            before = first.setdefault((call.fn, stream, id(key)), call)
            if before is not call:
                yield stream, before, call


def _used_up(call: Call) -> set[str]:
    """The leaves of the state and of `rngs=` that a call wrote, or drew from; none, where it cannot be traced again."""
    params, state, *args = call.args
    rngs = {name: call.kwargs[name] for name in ("rngs",) if name in call.kwargs}

    def run(_state: Tree, _rngs: dict[str, Any]) -> Any:
        _out, _new_state = call.fn(params, _state, *args, **{**call.kwargs, **_rngs})
        return keyed_leaves(_new_state, "state"), [leaf for leaf in jax.tree.leaves(_out) if is_numeric(leaf)]

    with contextlib.suppress(Exception), during(SILENT, True):
        closed, (after, _) = jax.make_jaxpr(run, return_shape=True)(state, rngs)
        before = keyed_leaves(state, "state") | keyed_leaves(rngs.get("rngs"), "rngs")
        return _read(closed.jaxpr, [*before], sorted(after))
    return set()


def _read(jaxpr: Any, before: list[str], after: list[str]) -> set[str]:
    """Says by key path which arguments come out as others, and which keys anything but the next keys is made from."""
    given, made = dict(zip(before, jaxpr.invars, strict=True)), dict(zip(after, jaxpr.outvars, strict=False))
    written = {path for path in given.keys() & made.keys() if source(jaxpr, made[path]) is not given[path]}
    keys = {path for path in given if path.startswith(("rngs", "state['rngs']"))}
    drawn = needed(jaxpr, [var for var in jaxpr.outvars if var not in [made[path] for path in keys & made.keys()]])
    return written - keys | {path for path in keys if given[path] in drawn}
