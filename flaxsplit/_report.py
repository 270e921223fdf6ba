"""What was found in a step, as values, as a page, as a table beside another step."""

import html
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ._describe import shorten
from ._refusals.explain import GROUPS, LESS, NONE_FOUND

_WIDTH, _PAGE = 100, 58
_UNITS = {"bytes": "B"}


@dataclass(frozen=True)
class Finding:
    """One fault of a step.

    Attributes:
        kind: its name, such as `weak type`.
        group: `compiles`, `state`, `memory`, `work`, `precision` or `dispatch`.
        where: the first leaf by its key path, or the operation.
        what: what is wrong.
        leaves: a line for each leaf or operation, never with values.
        cause: the likely cause.
        fix: what to write instead.
        cost: what is at stake, in `unit`.
        unit: `bytes`, `FLOP`, `keys`, `leaves` or `calls`.
    """

    kind: str
    group: str
    where: str
    what: str
    leaves: tuple[str, ...]
    cause: str
    fix: str
    cost: float
    unit: str

    def __str__(self) -> str:
        at_stake = f" [{_short(self.cost)}{_UNITS.get(self.unit, self.unit)}]" if self.cost else ""
        lines = [f"{self.group}, {self.kind}: {self.what}{at_stake}"]
        lines += [f"  {line}" for line in shorten(self.leaves, 4)]
        lines += [f"  likely cause: {self.cause}", f"  fix: {self.fix}"]
        return "\n".join(part for line in lines for part in _wrapped(line))


@dataclass(frozen=True)
class StepReport:
    """What `explain_step` saw. `print(report)` is a page.

    Attributes:
        name: the step's.
        findings: what is wrong, what costs most first.
        devices: how many the step is compiled for.
        platform: of which kind.
        seconds: `trace` and `compile`.
        leaves: how many go in and come out: `carry`, `batch`, `others`, `carry out`, `out`; `host`: arrays of NumPy.
        instructions: of the optimized module, by opcode, fused ones too.
        cost: `flops` and `bytes` of one device, as `cost_analysis` of XLA says.
        memory: bytes of one device, as `memory_analysis` says: `argument`, `output`, `alias`, `temp`, `peak`.
        collectives: for each kind, `times` and `bytes`.
        products: FLOPs of matmuls and convolutions by dtype, on all devices together.
    """

    name: str
    findings: tuple[Finding, ...]
    devices: int
    platform: str
    seconds: Mapping[str, float]
    leaves: Mapping[str, int]
    instructions: Mapping[str, int] = field(repr=False)
    cost: Mapping[str, float]
    memory: Mapping[str, int]
    collectives: Mapping[str, Mapping[str, int]]
    products: Mapping[str, int]

    def __str__(self) -> str:
        lines = [*self._head(), ""]
        for i, each in enumerate(self.findings):
            more = str(each).splitlines()
            if len(lines) + len(more) >= _PAGE:
                lines.append(LESS.format(len(self.findings) - i))
                break
            lines += [*more, ""]
        return "\n".join([*lines, *([] if self.findings else [NONE_FOUND])]).rstrip()

    def _repr_html_(self) -> str:
        rows = "".join(_html_row(each) for each in self.findings) or f"<tr><td>{html.escape(NONE_FOUND)}</td></tr>"
        return f"<pre>{html.escape(chr(10).join(self._head()))}</pre><table>{rows}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Gives everything as plain dicts, lists and numbers, for a log."""
        plain: dict[str, Any] = asdict(self)
        return plain | {"findings": [asdict(each) | {"leaves": [*each.leaves]} for each in self.findings]}

    def compare(self, other: "StepReport") -> str:
        """Puts two steps side by side, as a table: FLOPs, memory, collectives, instructions, and how they differ."""
        ours, theirs = _figures(self), _figures(other)
        names = list(dict.fromkeys([*ours, *theirs]))
        width = max(map(len, names))
        rows = [f"{'':{width}}  {self.name[:16]:>16}  {other.name[:16]:>16}"]
        for name in names:
            one, two = ours.get(name, 0), theirs.get(name, 0)
            difference = "" if one == two else f"  {two - one:+,.0f}"
            rows.append(f"{name:{width}}  {one:16,.0f}  {two:16,.0f}{difference}")
        return "\n".join(rows)

    def _head(self) -> Iterator[str]:
        """The figures, a line for each group."""
        count, some = len(self.findings), "finding" if len(self.findings) == 1 else "findings"
        yield f"{self.name}: {count} {some}, on {self.devices} x {self.platform}"
        yield "  seconds      " + ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items())
        yield "  leaves       " + ", ".join(f"{name} {value}" for name, value in self.leaves.items())
        yield "  work         " + (", ".join(f"{_short(x)}{name}" for name, x in self.cost.items()) or "unknown")
        yield "  products     " + (", ".join(f"{name} {_short(x)}FLOP" for name, x in self.products.items()) or "none")
        yield "  memory       " + (", ".join(f"{name} {_short(x)}B" for name, x in self.memory.items()) or "unknown")
        sent = (f"{each['times']} {name} {_short(each['bytes'])}B" for name, each in self.collectives.items())
        yield "  collectives  " + (", ".join(sent) or "none")
        most = Counter(self.instructions).most_common(5)
        counts = ", ".join(f"{count} {name}" for name, count in most)
        yield f"  HLO          {sum(self.instructions.values())} instructions: {counts}"


def order(finding: Finding) -> tuple[int, float]:
    """What comes first: by group, and within one by what it costs."""
    return GROUPS.index(finding.group), -finding.cost


def _figures(report: StepReport) -> dict[str, float]:
    collectives = {f"{name} {part}": x for name, each in report.collectives.items() for part, x in each.items()}
    memory = {f"memory: {name}": float(value) for name, value in report.memory.items()}
    sums = {**report.cost, **memory, **collectives, "instructions": sum(report.instructions.values())}
    return {**sums, **{f"  {name}": float(count) for name, count in sorted(report.instructions.items())}}


def _short(value: float) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # or it would be rounded to 1e+03 of the next smaller
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f} "


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _html_row(finding: Finding) -> str:
    cells = [f"{finding.group}, {finding.kind}", finding.what, *("\n".join(shorten(finding.leaves, 4)), finding.fix)]
    return "<tr>" + "".join(f"<td><pre>{html.escape(cell)}</pre></td>" for cell in cells) + "</tr>"
