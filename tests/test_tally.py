"""FLOPs of matmuls and convolutions, by the formula for each, however deep they are."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flaxsplit._tally import constants, products

from .flags import needs_jit
from .meshes import KINDS, line

pytestmark = needs_jit
LEFT, RIGHT = jnp.ones((8, 4), jnp.float32), jnp.ones((4, 3), jnp.float32)
WHOLE = 2 * 8 * 4 * 3


def flops_of(fn: Any, *args: Any) -> list[int]:
    return [each.flops for each in products(jax.make_jaxpr(fn)(*args).jaxpr)]


def test_a_product_counts_as_often_as_it_runs() -> None:
    def repeated(left: Any, right: Any) -> Any:
        return lax.scan(lambda total, _: (total + left @ right, None), jnp.zeros((8, 3), jnp.float32), length=5)[0]

    assert flops_of(jnp.matmul, LEFT, RIGHT) == [WHOLE]
    assert flops_of(jax.jit(jax.jit(jnp.matmul)), LEFT, RIGHT) == [WHOLE]
    assert flops_of(jax.jit(repeated), LEFT, RIGHT) == [5 * WHOLE]
    assert flops_of(jax.vmap(jnp.matmul), jnp.stack([LEFT] * 6), jnp.stack([RIGHT] * 6)) == [6 * WHOLE]


@KINDS
def test_of_a_shard_map_all_devices_count(kind: Any) -> None:
    """Each has its rows."""
    mesh = line(kind, 2)
    mapped: Any = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    places = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    assert flops_of(mapped, *jax.device_put((LEFT, RIGHT), places)) == [WHOLE]


@pytest.mark.parametrize(("features", "groups"), [(5, 1), (1, 1), (6, 3), (0, 1)])
@pytest.mark.parametrize("form", ["NCHW OIHW NCHW", "NHWC HWIO NHWC", "NHWC IHOW NHWC"])
def test_each_number_of_a_convolution_takes_the_kernel_of_its_group(features: int, groups: int, form: str) -> None:
    image, kernel, _ = axes = form.split()
    sizes = {"N": 2, "C": 3, "O": features, "I": 3 // groups}
    x, k = (jnp.ones([sizes.get(axis, size) for axis in each]) for each, size in ((image, 8), (kernel, 3)))

    def convolved(x: Any, k: Any) -> Any:
        numbers: Any = tuple(axes)
        return lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    assert flops_of(convolved, x, k) == [2 * (2 * features * 8 * 8) * (3 // groups * 3 * 3)]


def test_of_two_dtypes_the_wider_counts() -> None:
    half = LEFT.astype(jnp.bfloat16), RIGHT.astype(jnp.bfloat16)
    dot: Any = lambda left, right: lax.dot_general(left, right, (((1,), (0,)), ((), ())))  # noqa: E731
    for args, dtype, words in (
        ((LEFT, RIGHT), "float32", "f32[8,4], f32[4,3]"),
        ((half[0], RIGHT), "float32", "bf16[8,4], f32[4,3]"),
        ((LEFT, half[1]), "float32", "f32[8,4], bf16[4,3]"),
        (half, "bfloat16", "bf16[8,4], bf16[4,3]"),
    ):
        (each,) = products(jax.make_jaxpr(dot)(*args).jaxpr)
        assert (each.dtype, each.words) == (dtype, f"dot_general: {words}")


def test_what_is_closed_over_is_listed_once_however_deep() -> None:
    one, two = jnp.arange(3.0), jnp.arange(4.0)

    def inner(x: Any) -> Any:
        return x + one.sum() + two.sum()

    def outer(x: Any) -> Any:
        return jax.jit(inner)(x) + lax.scan(lambda total, _: (total + one, None), one, length=2)[0].sum()

    held = constants(jax.make_jaxpr(outer)(1.0))
    assert sorted(each.size for each in held if each.ndim) == [3, 4]
