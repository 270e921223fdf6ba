"""What is put where, as several processes see it: here with stand-ins, in `tests/distributed` with real ones."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

import flaxsplit as fs
from flaxsplit import _place

place: Any = _place  # its parts are private, and tested here alone

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def seen(whole: bool, *processes: int) -> Any:
    """A leaf or sharding that is whole in this process or is not, over devices of these processes."""
    devices = [SimpleNamespace(process_index=each) for each in processes]
    return SimpleNamespace(is_fully_addressable=whole, device_set=devices)


@pytest.mark.parametrize(("leaf", "sharding"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_whole_here_and_is_to_be_shared_is_spread(leaf: bool, sharding: bool) -> None:
    assert place._spreads(seen(leaf), seen(sharding)) == (leaf and not sharding)


def test_all_processes_come_only_where_each_has_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert place._is_all(seen(False, 0, 1, 1))
    assert not place._is_all(seen(False, 1, 1))


KEY = jax.random.key(3)


@pytest.mark.parametrize("leaf", [jnp.arange(6.0).reshape(2, 3), KEY, jax.random.split(KEY)], ids=str)
def test_what_is_spread_is_the_same(leaf: jax.Array) -> None:
    spread = place._spread(leaf, HERE)
    assert (spread.dtype, spread.shape) == (leaf.dtype, leaf.shape)
    assert jnp.all(spread == leaf)


@pytest.mark.parametrize("other", [0, 1, 2])
def test_leaves_that_differ_between_processes_are_named(other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = {"carry.params['w']": jnp.ones(2, jnp.float32), "carry.state['rngs']['dropout']": jax.random.key(0)}

    def gathered(ours: np.ndarray) -> np.ndarray:
        theirs = ours.copy()
        theirs[:other] += 1
        return np.stack([ours, theirs])

    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    place._check_equal("here", {})
    if not other:
        place._check_equal("here", leaves)
        return
    with pytest.raises(fs.SignatureError) as caught:
        place._check_equal("here", leaves)
    words = ["carry.params['w']: f32[2]", "carry.state['rngs']['dropout']: key<fry>[]"]
    assert caught.value.leaves == tuple(words[:other])


def test_a_checksum_is_of_the_values_and_of_a_key_too() -> None:
    arrays = [jnp.zeros(3), jnp.ones(3), jax.random.key(0), jax.random.key(1)]
    assert len({place._checksum(each) for each in arrays}) == 4
    assert place._checksum(jnp.ones(3)) == place._checksum(arrays[1])


def test_only_what_every_process_has_a_part_of_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(place, "_check_equal", lambda where, leaves: compared.append([*leaves]))
    monkeypatch.setattr(place, "_spread", lambda leaf, sharding: (leaf, sharding))
    monkeypatch.setattr(jax, "device_put", lambda leaf, sharding: leaf)
    both, one, here = seen(False, 0, 1), seen(False, 1), seen(True, 0)
    leaf: Any = seen(True)
    put = place.placed("here", {"a": (leaf, both), "b": (leaf, one), "c": (leaf, here), "d": (seen(False), both)})
    assert compared == [["a"]]
    assert [isinstance(each, tuple) for each in put] == [True, True, False, False]
