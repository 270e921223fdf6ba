"""What an executable says of itself, read exactly: instructions, collectives, memory, FLOPs."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flaxsplit as fs
from flaxsplit import _look
from flaxsplit._compiled import collectives, cost_of, instructions, memory_of

from .flags import needs_jit, needs_x32
from .meshes import KINDS, line

TEXT = """
ENTRY %main (p: f32[8,4]) -> s4[5] {
  %p = f32[8,4]{1,0} parameter(0), sharding={replicated}
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  %all-reduce.2 = (bf16[3]{0}, pred[5]{0}, u1[3]{0}) all-reduce(%a, %b, %c), to_apply=%add
  %gather = (f32[4]{0}, f32[8]{0}) all-gather-start(%d), dimensions={0}
  %done = f32[8]{0} all-gather-done(%gather)
  %scalar = f64[] all-reduce(%e)
  ROOT %permute = s4[5]{0} collective-permute(%x)
}
"""


def test_collectives_are_counted_with_the_bytes_that_they_give() -> None:
    assert collectives(TEXT) == {
        "all-reduce": (3, 8 * 4 * 4 + 3 * 2 + 5 + 3 + 8),
        "all-gather": (1, 32),
        "collective-permute": (1, 5),
    }
    assert instructions(TEXT) == {
        "parameter": 1,
        "all-reduce": 3,
        "all-gather-start": 1,
        "all-gather-done": 1,
        "collective-permute": 1,
    }


def sized(**stats: int) -> Any:
    said = {f"{name}_size_in_bytes": count for name, count in stats.items() if name != "peak"}
    peak = {"peak_memory_in_bytes": stats["peak"]} if "peak" in stats else {}
    return SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**said, **peak))


SIZES = {"argument": 100, "output": 40, "alias": 30, "temp": 7}


@pytest.mark.parametrize(("said", "peak"), [(150, 150), (7, 7), (6, 117), (None, 117)])
def test_the_peak_is_what_is_said_unless_that_leaves_out_what_is_temporary(said: int | None, peak: int) -> None:
    stats = SIZES if said is None else SIZES | {"peak": said}
    assert memory_of(sized(**stats)) == SIZES | {"peak": peak}


def test_without_temporaries_a_peak_that_is_not_said_is_what_goes_in_and_out() -> None:
    assert memory_of(sized(**SIZES | {"temp": 0}))["peak"] == 110


def test_a_backend_that_says_nothing_has_no_figures() -> None:
    silent = SimpleNamespace(memory_analysis=lambda: None, cost_analysis=lambda: None)
    assert memory_of(silent) == cost_of(silent) == {}
    assert memory_of(sized()) == dict.fromkeys([*SIZES, "peak"], 0)


@pytest.mark.parametrize("said", [{"flops": 3, "bytes accessed": 5}, {"flops": 3}, {"bytes accessed": 5}])
def test_the_cost_is_of_the_first_device_of_a_list(said: dict[str, float]) -> None:
    expected = {"flops": float(said.get("flops", 0)), "bytes": float(said.get("bytes accessed", 0))}
    for given in (said, [said], [said, {"flops": 9}]):
        assert cost_of(SimpleNamespace(cost_analysis=lambda given=given: given)) == expected


@needs_jit
@needs_x32
@KINDS
def test_the_figures_of_a_step_are_exact(kind: Any) -> None:
    """A sum over two devices of eight rows: one all-reduce."""
    mesh = line(kind, 2)

    def step(carry: Any, batch: Any, scale: Any) -> Any:
        return {"sum": carry["sum"] + (batch @ carry["w"]).sum(0), "w": carry["w"]}, 2 * scale

    carry = jax.device_put({"sum": jnp.zeros(3), "w": jnp.ones((4, 3))}, NamedSharding(mesh, P()))
    batch = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
    begun = time.perf_counter()
    report = fs.explain_step(step, carry, batch, np.ones(3, np.float32))
    elapsed = time.perf_counter() - begun
    assert 0 < min(report.seconds.values()) < sum(report.seconds.values()) < elapsed
    assert report.collectives == {"all-reduce": {"times": 1, "bytes": 12}}
    assert report.products == {"float32": 2 * 8 * 4 * 3}
    assert report.leaves == {"carry": 2, "batch": 1, "others": 1, "carry out": 2, "out": 1, "host": 1}
    assert (report.name, report.devices, report.platform) == ("step", 2, jax.default_backend())
    assert report.memory["argument"] == 4 * (3 + 12 + 16 + 3)


@needs_jit
@needs_x32
def test_each_leaf_has_its_place_and_its_bytes() -> None:
    def step(carry: Any, batch: Any) -> Any:
        return {"n": carry["n"] + 1, "w": carry["w"] + batch.sum()}, batch

    carry, batch = {"n": jnp.int8(0), "w": jnp.ones((4, 3))}, jnp.ones(5)
    look = _look.look_at(step, carry, batch, (), {})
    assert {leaf.path: leaf.bytes for leaf in look.inputs} == {"carry['n']": 1, "carry['w']": 48, "batch": 20}
    assert all(leaf.place is not None for leaf in look.inputs)
    assert dataclasses.replace(look, inputs=()).devices == 1
    atoms: Any = look.jaxpr.invars[:2]
    unknown = _look._leaves({"carry": carry}, lambda _: True, atoms, [], [False] * 2)  # pyright: ignore[reportPrivateUsage]
    assert [leaf.place for leaf in unknown] == [None, None]
