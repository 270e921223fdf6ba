"""Importing flaxsplit takes at most 50 ms over importing jax, flax and optax.

Each repetition is a new process, which imports those first and then the contender, and says how long that took: from
bytecode, as an installed package has it, and without the garbage collector, which goes through all of jax when it runs.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

from ._measure import OURS, Effort, Row, Tell

PROMISED = "50 ms"
CODE = """
import gc, time, jax, flax, flax.linen, optax, jaxtyping
gc.disable()
began = time.perf_counter()
import flaxsplit
print(time.perf_counter() - began)
"""


def measure(effort: Effort, tell: Tell) -> Iterator[Row]:
    """Seconds in new processes, the files warm in the page cache."""
    if not effort.wants("all of it"):
        return
    samples = list[float]()
    count = min(effort.rounds, 20) // 2 + 1
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for i in range(count + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
        samples.append(float(done.stdout))
        tell(f"process {i + 1} of {count + 1}")
    taken = {PROMISED: [0.05], OURS: samples[1:]}
    yield Row("import flaxsplit, over jax, flax and optax", "s", taken, PROMISED, bounds={OURS: 1.0})
