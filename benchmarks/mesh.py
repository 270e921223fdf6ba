"""On a mesh each device computes its share of each microbatch and no more, and no batch is gathered.

Virtual CPU devices, so the numbers are exact and the same anywhere: FLOPs of products of matrices, bytes that come out
of collectives, temporary memory, all of one device; and compiles over three steps. No times: the devices share a CPU.
"""

from collections.abc import Iterator
from typing import Any

from ._measure import HAND, OURS, Effort, Row, Tell, elsewhere, told
from ._peers import check_agree

SHARE = "an equal share"


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Compiles the step for 1 to 8 devices, in 1 to 8 microbatches."""
    sizes = effort.of(smoke=[(2, 2)], quick=[(1, 1), (8, 1), (8, 4)], full=[(d, n) for d in POWERS for n in POWERS])
    for devices, count in sizes:
        case = f"{devices} device{'s' * (devices > 1)}, {f'{count} microbatches' if count > 1 else 'the batch whole'}"
        if not effort.wants(case):
            continue
        tell(case)
        flags = f"--xla_force_host_platform_device_count={devices}"
        arguments = (str(devices), str(count))
        found = elsewhere("benchmarks._devices", *arguments, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
        check_agree({name: each["losses"] for name, each in found.items()})
        yield from rows(case, found, devices)


POWERS = (1, 2, 4, 8)


def rows(case: str, found: dict[str, Any], devices: int) -> Iterator[Row]:
    """The lines of one mesh and one number of microbatches."""

    def of(what: str) -> dict[str, list[float]]:
        return {name: [float(each[what])] for name, each in found.items()}

    flops = {SHARE: [found[HAND]["share"]]} | of("flops")
    yield Row(f"FLOPs per device, {case}", "FLOP", flops, SHARE, bounds={OURS: 1.01})
    sent = {name: [float(sum(each["sent"].values()))] for name, each in found.items()}
    if devices > 1:
        notes = {name: _by_kind(each["sent"]) for name, each in found.items()}
        yield Row(f"sent per device, {case}", "bytes", sent, bounds={OURS: 1.0}, notes=notes)
    yield Row(f"temporary memory per device, {case}", "bytes", of("memory"), bounds={OURS: 1.0})
    yield Row(f"compiles, {case}", "compiles", of("compiles"), bounds={OURS: 1.0})


def _by_kind(sent: dict[str, int]) -> str:
    return ", ".join(f"{kind} {told(size, 'bytes')}" for kind, size in sorted(sent.items()))
