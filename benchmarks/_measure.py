"""How everything here is measured: warm, interleaved in random order, blocking; medians, quartiles, paired ratios."""

import datetime
import json
import math
import os
import pathlib
import platform
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np
from scipy import stats

HAND, AGAIN, OURS = "by hand", "by hand, again", "flaxsplit"
SAME = {HAND: HAND, AGAIN: HAND, OURS: OURS}  # what each contender is: by hand twice, for the noise floor
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "jaxtyping", "typeguard", "numpy", "equinox", "dm-haiku")

HERE = pathlib.Path(__file__).parent
Run = Callable[[], Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How hard to look: `smoke` proves that a benchmark runs, `quick` shows a ratio, `full` is for the record.

    `lease` is for a device that is there for minutes: the sizes of `quick`, of networks the large ones. Where a run is
    `planned`, `wants` is asked before each case and may say no: the most valuable come first, and it stops in time.
    `fewest` rounds are run even where they take longer than `seconds`.
    """

    name: str
    rounds: int
    seconds: float
    fewest: int
    wants: Callable[[str], bool] = lambda case: True
    planned: bool = False

    def of(self, *, smoke: Iterable[Any], quick: Iterable[Any], full: Iterable[Any]) -> list[Any]:
        """Chooses the sizes to measure."""
        sizes = {"smoke": smoke, "quick": quick, "lease": quick, "full": full}
        return [*sizes[self.name]]


_ENOUGH = 8  # fewer samples of a time have no interval that means anything
EFFORTS = {
    each.name: each
    for each in (
        Effort("smoke", 3, 1, 3),
        Effort("quick", 40, 4, 3),
        Effort("lease", 60, 6, _ENOUGH),
        Effort("full", 300, 20, _ENOUGH),
    )
}


@dataclass(frozen=True)
class Row:
    """One line of a claim: the samples of each contender, in seconds, bytes or counts.

    Attributes:
        bounds: how many times the baseline a contender may take, by the design.
        x: where the line stands in a plot, in the unit that the claim varies.
        notes: a sentence on a contender, also on one that has no samples.
        work: what is done in one sample, and the most that the device can do, by name.
    """

    case: str
    unit: str
    samples: Mapping[str, list[float]]
    baseline: str = HAND
    bounds: Mapping[str, float] = field(default_factory=dict)
    x: float | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    work: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios to the baseline, with its 95 % confidence interval: all numbers, if samples are few."""

    value: float
    low: float = 0.0
    high: float = math.inf

    @property
    def spread(self) -> tuple[float, float]:
        """How far the interval reaches below and above the value, for a picture: nowhere where there is none."""
        return (self.value - self.low, self.high - self.value) if math.isfinite(self.high) else (0.0, 0.0)

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if any(self.spread) else ""
        return f"{self.value:.3f}{interval}"


@dataclass
class Result:
    """What a claim's run is stored as. `cases` are those that were finished, of a run that may stop between two."""

    claim: str
    statement: str
    rows: list[Row]
    effort: str
    cases: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=lambda: about())


def timed(
    case: str,
    contenders: Mapping[str, Run],
    effort: Effort,
    tell: Tell,
    *,
    per: int = 1,
    baseline: str = HAND,
    bounds: Mapping[str, float] | None = None,
    x: float | None = None,
    notes: Mapping[str, str] | None = None,
    work: Mapping[str, float] | None = None,
) -> Row:
    """Runs each contender once per round, blocking on what it returns; seconds per each of the `per` things it does."""
    samples = {name: list[float]() for name in contenders}
    for name in [*contenders] * 2:
        jax.block_until_ready(contenders[name]())
    for name in in_turn(contenders, effort, lambda words: tell(f"{case}: {words}")):
        samples[name].append(seconds(contenders[name]) / per)
    return Row(case, "s", samples, baseline, bounds or {}, x, notes or {}, work or {})


def seconds(run: Run) -> float:
    """The time until what it returns is there."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turn(names: Iterable[str], effort: Effort, tell: Tell, most: int = 10_000) -> Iterator[str]:
    """Every name once per round, in an order that chance draws anew, for as many rounds as the effort has time for."""
    order, chance = [*names], random.Random(0)  # noqa: S311 (an order, not a secret)
    end = time.perf_counter() + effort.seconds
    for i in range(min(most, effort.rounds)):
        if i >= effort.fewest and time.perf_counter() > end:
            return
        tell(f"round {i + 1} of at most {effort.rounds}")
        chance.shuffle(order)
        yield from order


def ratios(row: Row) -> dict[str, Ratio]:
    """Each contender against the baseline, round by round, so that what slows a whole round cancels."""
    base = np.array(row.samples[row.baseline])
    times = row.unit == "s"
    return {name: _ratio(np.array(each) / base, times) for name, each in row.samples.items() if name != row.baseline}


def _ratio(paired: np.ndarray, times: bool) -> Ratio:
    value = float(np.median(paired))
    if not times:  # exact
        return Ratio(value, float(paired.min()), float(paired.max()))
    return interval(value, (paired,), np.median)


def interval(value: float, samples: tuple[Any, ...], statistic: Callable[..., Any]) -> Ratio:
    """A ratio with what 2000 draws of the samples say of it, where there are enough to draw from."""
    if min(map(len, samples)) < _ENOUGH:
        return Ratio(value)
    found = stats.bootstrap(samples, statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    return Ratio(value, *map(float, found.confidence_interval))


HOLDS, BROKEN, OPEN = "holds", "broken", "not decided"


def _verdicts(row: Row, found: Mapping[str, Ratio]) -> dict[str, str]:
    """Whether each bounded contender keeps to its bound; where the interval holds the bound, that is not decided."""
    inside = _inside(found)
    return {name: _verdict(found[name], bound, inside) for name, bound in row.bounds.items() if name in found}


def _verdict(ratio: Ratio, bound: float, inside: bool) -> str:
    return HOLDS if ratio.high <= bound else BROKEN if ratio.low > bound and not inside else OPEN


def _inside(found: Mapping[str, Ratio]) -> bool:
    """Whether flaxsplit differs from the baseline by less than the baseline from itself."""
    noise, ours = found.get(AGAIN), found.get(OURS)
    return bool(noise and ours and max(noise.low, ours.low) <= min(noise.high, ours.high) < math.inf)


def verdict(row: Row) -> str:
    """The verdicts on a row in words."""
    found = ratios(row)
    said = [f"at most {row.bounds[name]:g}: {word}" for name, word in _verdicts(row, found).items()]
    return "; ".join([*said, *(["difference inside the noise"] if said and _inside(found) else [])])


SUMMARY = ("claim", "promised", "measured", "the baseline against itself", "cases", "verdict")


def summary(results: Iterable[Result]) -> Iterator[tuple[str, ...]]:
    """Each bounded claim in a line, over all its cases."""
    for result in results:
        bounded = [(row, ratios(row)) for row in result.rows if row.bounds]
        if bounded:
            ours = [found[name] for row, found in bounded for name in row.bounds]
            noise = [found[AGAIN] for _, found in bounded if AGAIN in found]
            bounds = {f"at most {bound:.2f} of {row.baseline}" for row, _ in bounded for bound in row.bounds.values()}
            said = Counter(word for row, found in bounded for word in _verdicts(row, found).values())
            told = ", ".join(f"{word} in {said[word]}" for word in (HOLDS, BROKEN, OPEN) if said[word])
            words = told if len(said) > 1 else next(iter(said))
            yield result.claim, ", ".join(sorted(bounds)), _span(ours), _span(noise), str(len(ours)), words


def _span(found: list[Ratio]) -> str:
    """From the lowest to the highest, which shows its interval."""
    if not found:
        return ""
    low, high = min(found, key=lambda ratio: ratio.value), max(found, key=lambda ratio: ratio.value)
    return str(high) if low.value == high.value else f"{low.value:.3f} to {high}"


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = np.percentile([*samples], [25, 50, 75])
    return float(low), float(middle), float(high)


def contenders(row: Row) -> Iterator[tuple[str, str, str, str, str]]:
    """Each contender's name, number of samples, median, quartiles, and ratio to the baseline, in words."""
    found = ratios(row)
    for name, samples in row.samples.items():
        low, middle, high = (told(value, row.unit) for value in quartiles(samples))
        spread = f"{low} - {high}" if len(samples) > 1 else "exact" if row.unit != "s" else ""
        yield name, str(len(samples)), middle, spread, str(found.get(name, ""))


def rate(row: Row, name: str) -> str:
    """What a contender does in a second, and the share of what the device can do."""
    if "examples" not in row.work:
        return ""
    took = quartiles(row.samples[name])[1]
    shares = [
        f"{row.work[each] / took / row.work[f'{each}/s']:.0%} of the peak in {each}" for each in ("FLOP", "bytes")
    ]
    return "; ".join([f"{row.work['examples'] / took:.4g} examples/s", *shares])


def told(value: float, unit: str) -> str:
    """A quantity in the unit that reads best."""
    steps = {"s": [("s", 1.0), ("ms", 1e-3), ("us", 1e-6)], "bytes": [("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)]}
    for name, size in steps.get(unit, [(unit, 1.0)]):
        if value >= size:
            return f"{value / size:.4g} {name}"
    return f"{value:.4g} {unit}"


def about() -> dict[str, Any]:
    """Versions, device and commit: what a number means nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": _cores(),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "absent"


def elsewhere(module: str, *arguments: str, **environment: str) -> Any:
    """What a module of this package prints as its last line, JSON, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=HERE.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"benchmarks: {module} failed in a process with {environment}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(jitted: Any, *args: Any) -> Any:
    """XLA's own account of the bytes that a jitted function needs."""
    return jitted.lower(*args).compile().memory_analysis()


def commit(folder: pathlib.Path = HERE) -> str:
    """The commit; dirty where what is measured, or what measures, was changed: results and pages may be."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S607
        return done.stdout.strip()

    try:
        name = git("describe", "--always", "--exclude=*")
        changed = git("status", "--porcelain", "--", "../flaxsplit", ":(glob)*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changed else name


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folder_name() -> str:
    """The device as the name of a folder: `cpu`, `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def store(result: Result, folder: pathlib.Path) -> pathlib.Path:
    """Writes a result, every sample of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.claim}.json"
    rounded = json.loads(json.dumps(asdict(result)), parse_float=lambda text: float(f"{float(text):.6g}"))
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(rounded, indent=1) + "\n")
    draft.replace(path)  # at once: whoever is killed here leaves the file of before, whole
    return path


def load(path: pathlib.Path) -> Result:
    """Reads what `store` wrote."""
    stored: dict[str, Any] = json.loads(path.read_text())
    rows = [Row(**row) for row in stored.pop("rows")]
    return Result(rows=rows, **stored)
