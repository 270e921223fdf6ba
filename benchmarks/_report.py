"""Stored results as a report to read: Markdown, plots, a comparison of two runs, and the tables in the README."""

import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

from . import _measure as m
from ._peers import SAID, USUAL

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
MARK = re.compile(r"(<!-- benchmarks: begin -->\n).*?(<!-- benchmarks: end -->)", re.DOTALL)
MATRIX = "recompilation"
ROUND = (0.5, 1, 2, 5, 10, 20, 50)


def report(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `report.md` and the plots beside the results in a folder; gives what it wrote."""
    results = read(folder)
    mpl.use("Agg")
    plots = {result.claim: plotted(result, folder) for result in results}
    page = folder / "report.md"
    page.write_text("\n".join(_page(results, plots)) + "\n")
    return [page, *(path for paths in plots.values() for path in paths)]


def read(folder: pathlib.Path) -> list[m.Result]:
    """Every result in a folder, by name."""
    results = [m.load(path) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"benchmarks: no results in {folder}; python -m benchmarks --full stores some")
    return results


def where(about: dict[str, object]) -> str:
    """The machine and the versions in one line."""
    versions = about["versions"]
    named = [f"{name} {versions[name]}" for name in ("jax", "flax", "optax")] if isinstance(versions, dict) else []
    machine = f"{about['device']}, {about['processor']}, {about['cores']} cores"
    return f"{machine}; Python {about['python']}, {', '.join(named)}; {str(about['date'])[:10]}"


OPEN = "Not decided: the interval of the ratio holds the promise, or the samples are fewer than eight and have none."
KINDS = (
    "Medians; ratios are medians of paired ratios, with their 95 % confidence interval. Fewer than eight samples of a\n"
    "time have none, and decide nothing."
)


def _page(results: list[m.Result], plots: dict[str, list[pathlib.Path]]) -> list[str]:
    lines = ["# What was measured", "", KINDS, runs_of(results), ""]
    for result in results:
        about = f"`{result.about['command']}` ({result.effort}) on {where(result.about)}"
        lines += [f"## {result.claim}", "", result.statement, "", about]
        for path in plots[result.claim]:
            lines += ["", f"![{path.stem}]({path.name})"] if path.suffix == ".svg" else []
        lines += ["", *(_matrix(result) if result.claim == MATRIX else _rows(result)), ""]
    return lines


def runs_of(results: list[m.Result]) -> str:
    """Whether all of it is of one run, which is what makes its numbers comparable."""
    runs = {(each.about["command"], each.about["commit"], str(each.about["date"])[:10]) for each in results}
    if len(runs) > 1:
        return "The claims are of several runs: compare numbers inside a claim, not between claims."
    command, commit, day = runs.pop()
    return f"All of one run: `{command}`, of {commit}, on {day}."


def _rows(result: m.Result) -> Iterator[str]:
    rated = any(row.work for row in result.rows)
    heads = ["case", "contender", "samples", "median", "quartiles", "ratio", *(["rate"] if rated else []), "verdict"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in result.rows:
        for i, (name, *told) in enumerate(m.contenders(row)):
            case, verdict = (row.case, m.verdict(row)) if i == 0 else ("", "")
            rate = [m.rate(row, name)] if rated else []
            yield f"| {' | '.join([case, name, *told, *rate, verdict])} |"
    for case, name, words in dict.fromkeys(
        (row.case, name, words) for row in result.rows for name, words in row.notes.items()
    ):
        yield f"\n{case}, {name}: {words}."


def cells(result: m.Result) -> dict[str, dict[str, tuple[str, str]]]:
    """Compiles and the sentence about them, by scenario and implementation."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for row in result.rows:
        if row.unit == "compiles":
            numbers = {name: f"{each[0]:.0f}" for name, each in row.samples.items()}
            told = {name: words for name, words in row.notes.items() if name not in SAID}
            found[row.case] = {name: (numbers.get(name, ""), words) for name, words in told.items()}
    return found


def _columns(found: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    return list(dict.fromkeys(name for row in found.values() for name in row))


def _matrix(result: m.Result) -> Iterator[str]:
    found = cells(result)
    names = _columns(found)
    traces = {row.case: row.samples for row in result.rows if row.unit == "traces"}
    yield from _grid(found, names)
    yield from said(result)
    yield "\nWhy, by situation; where traces and compiles differ in number, traces come in brackets:\n"
    for title, row in found.items():
        yield f"- **{title}**"
        told: dict[str, list[str]] = {}
        for name, (number, words) in row.items():
            traced = f"{traces[title][name][0]:.0f}" if name in traces[title] else ""
            both = number if traced == number else f"{number} ({traced} traces)"
            told.setdefault(f"{both}: {words}" if number else words, []).append(name)
        for words, of in told.items():
            yield f"    - {', '.join(of)}: {words}."


def said(result: m.Result) -> Iterator[str]:
    """What is said where a step compiles again, by JAX and by us."""
    told = {row.case: row.notes for row in result.rows if row.unit == "compiles" and row.notes.keys() & {*SAID}}
    if told:
        yield "\nWhat is said of the second trace, of the plainest step that compiles again:\n"
        yield f"| situation | {' | '.join(SAID)} |"
        yield "|---" * (len(SAID) + 1) + "|"
        for case, notes in told.items():
            words = (notes[key] for key in SAID)
            yield f"| {case} | {' | '.join(f'`{each}`' for each in words)} |"


def _grid(found: dict[str, dict[str, tuple[str, str]]], names: list[str]) -> Iterator[str]:
    yield f"| compiles over 20 steps | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for title, row in found.items():
        numbers = [row.get(name, ("", "not run")) for name in names]
        yield f"| {title} | {' | '.join(number or why_none(words) for number, words in numbers)} |"


def why_none(words: str) -> str:
    return "refuses" if words.startswith("refuses") else "not installed" if words.endswith("not installed") else "-"


def drawings(result: m.Result) -> dict[str, Any]:
    """What draws a result, by the name of the picture."""
    if result.claim == MATRIX:
        return {result.claim: _draw_matrix(result)}
    lines, bars = _timed(result, along=True), _timed(result, along=False)
    found = {result.claim: _draw_lines(result)} if len(lines) > 1 else {}
    return found | ({f"{result.claim}-by-case": _draw_bars(result)} if bars else {})


def _timed(result: m.Result, along: bool) -> list[m.Row]:
    """The rows that lie along what the claim varies, or those that stand alone."""
    rows = [row for row in result.rows if row.unit == "s" and len(row.samples) > 1]
    return [row for row in rows if (row.x is not None) == along]


def plotted(result: m.Result, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws a result, as PNG and SVG; gives the files."""
    paths = []
    for name, figure in drawings(result).items():
        width = int(13 * figure.get_figwidth())  # in letters
        figure.suptitle(textwrap.fill(result.statement.replace("`", ""), width), fontsize=10)
        figure.supxlabel(textwrap.fill(where(result.about), int(1.5 * width)), fontsize=6.5, color="dimgray")
        for kind in ("png", "svg"):
            mpl.rcParams["svg.hashsalt"] = name  # the same picture is the same file
            path = folder / f"{name}.{kind}"
            figure.savefig(path, dpi=120, metadata={"Date": None} if kind == "svg" else {"Software": None})
            paths.append(path)
    plt.close("all")
    return paths


def _draw_lines(result: m.Result) -> Any:
    """Each contender's ratio to the baseline, with its interval, against what varies; a panel for each kind of case."""
    rows = _timed(result, along=True)
    kinds = list(dict.fromkeys(map(_kind, rows)))
    size = (max(6.4, 3.4 * len(kinds)), 3.8)
    figure, panels = plt.subplots(1, len(kinds), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for kind, axes in zip(kinds, panels[0], strict=True):
        lines: dict[str, list[tuple[float, m.Ratio]]] = {}
        for row in [row for row in rows if _kind(row) == kind]:
            for name, ratio in m.ratios(row).items():
                lines.setdefault(name, []).append((row.x or 0.0, ratio))
        for name, points in lines.items():
            xs, found = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            spread = [*zip(*(each.spread for each in found), strict=True)]
            color = {m.OURS: "tab:blue", m.AGAIN: "silver"}.get(name, "tab:orange")
            axes.errorbar(xs, [each.value for each in found], spread, marker="o", capsize=3, label=name, color=color)
        axes.axhline(1, color="black", linewidth=0.8)
        for bound in sorted({bound for row in rows if _kind(row) == kind for bound in row.bounds.values()}):
            axes.axhline(bound, color="black", linestyle=":", linewidth=0.8, label=f"promised: {bound:g}")
        axes.set(xscale="log", xlabel=_axis(result), title=kind if len(kinds) > 1 else "")
        at = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    panels[0][0].set_ylabel(f"time / {rows[0].baseline}")
    return figure


def _draw_bars(result: m.Result) -> Any:
    """Each contender's ratio to the baseline as a bar with its interval, case by case."""
    rows = _timed(result, along=False)
    bars = [(row, name, ratio) for row in rows for name, ratio in m.ratios(row).items()]
    figure, axes = plt.subplots(figsize=(7.2, 1.2 + 0.24 * (len(bars) + len(rows))), layout="constrained")
    at, ticks, names = 0.0, list[float](), list[str]()
    for row in rows:
        style: dict[str, Any] = {"weight": "bold", "va": "center", "fontsize": 8, "bbox": {"color": "w", "pad": 1}}
        axes.text(0.01, at, row.case, transform=axes.get_yaxis_transform(), **style)
        for name, ratio in m.ratios(row).items():
            at += 1
            ticks.append(at)
            names.append(name)
            spread = [[each] for each in ratio.spread]
            axes.barh(at, ratio.value, xerr=spread, height=0.8, color="tab:blue" if name == m.OURS else "lightgray")
            axes.text(ratio.value + ratio.spread[1], at, f" {ratio.value:.2f}", va="center", fontsize=7)
        at += 1
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(ticks, names, fontsize=7)
    wide = max(ratio.value + ratio.spread[1] for *_, ratio in bars) > 4
    axes.set(xlabel=f"time / {rows[0].baseline}", xscale="log" if wide else "linear")
    if wide:
        axes.set_xticks(ROUND, [f"{x:g}" for x in ROUND])
        axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_ylim(at - 0.3, -0.8)  # from above
    return figure


def _draw_matrix(result: m.Result) -> Any:
    """Compiles by situation and implementation: the fewest possible is light, more is dark."""
    found = cells(result)
    names = _columns(found)
    grid = np.array([[float(row.get(name, ("", ""))[0] or "nan") for name in names] for row in found.values()])
    figure, axes = plt.subplots(figsize=(2.6 + 0.5 * len(names), 2.2 + 0.3 * len(found)), layout="constrained")
    fewest = np.array([[row.work["possible"]] for row in result.rows if row.unit == "compiles"])
    axes.imshow(np.minimum(grid - fewest, 3), cmap="Oranges", vmin=-0.5, vmax=4, aspect="auto")
    for i, row in enumerate(found.values()):
        for j, name in enumerate(names):
            number, words = row.get(name, ("", ""))
            axes.text(j, i, number or {"refuses": "x"}.get(why_none(words), "-"), ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.set_title("compiles over 20 steps (x: refuses, -: has no such thing, pale: as few as possible)", fontsize=9)
    return figure


def _kind(row: m.Row) -> str:
    """What a case is called without the number that it varies."""
    return re.sub(r"^(width )?[\d ]*(steps|leaves)?(, )?|, \d+ layers$", "", row.case) or row.case.split()[-1]


def _axis(result: m.Result) -> str:
    words = {"dispatch": "leaves", "scan": "steps in one dispatch", "tracing": "layers", "vmap": "width"}
    return words.get(result.claim, "")


def table(results: list[m.Result]) -> Iterator[str]:
    """What the README shows: each bounded claim, over all its cases."""
    yield f"| {' | '.join(m.SUMMARY)} |"
    yield "|---" * len(m.SUMMARY) + "|"
    for line in m.summary(results):
        yield f"| {' | '.join(line)} |"


def speeds(result: m.Result) -> Iterator[str]:
    """Examples per second of each network by every implementation, and flaxsplit's share of the device's peak."""
    names = list(dict.fromkeys(name for row in result.rows for name in row.samples if name != m.AGAIN))
    yield f"| examples/s | {' | '.join(names)} | flaxsplit's share of the peak |"
    yield "|---" * (len(names) + 2) + "|"
    for row in result.rows:
        rates = {name: m.rate(row, name).split("; ", 1) for name in row.samples}
        numbers = [rates[name][0].removesuffix(" examples/s") if name in rates else "-" for name in names]
        yield f"| {row.case} | {' | '.join(numbers)} | {rates[m.OURS][1]} |"


def by_stack(results: list[m.Result]) -> list[list[m.Result]]:
    """Results that were measured on one machine with the same versions, apart from others; the latest first."""
    stacks: dict[str, list[m.Result]] = {}
    for each in results:
        stacks.setdefault(where({**each.about, "date": ""}), []).append(each)
    return sorted(stacks.values(), key=lambda part: max(str(each.about["date"]) for each in part), reverse=True)


def readme(text: str, folder: pathlib.Path = RESULTS) -> str:
    """Puts the tables of every stored device between the README's marks, the matrix of compiles first."""
    stored = [read(each) for each in sorted(folder.iterdir()) if each.is_dir()]
    words: list[str] = []
    for result in [result for results in stored[:1] for result in results if result.claim == MATRIX]:
        found = cells(result)
        words += ["", "How often each compiles its step over 20 steps, by situation (`-`: has no such thing):", ""]
        words += _grid(found, [name for name in USUAL if any(name in row for row in found.values())])
        words += [
            "",
            "Each number has its sentence in the report, and every peer its donated or cached form beside it.",
        ]
    for results in (part for each in stored for part in by_stack(each)):
        kept = "Median ratios of time (memory: of bytes), lowest to highest over the cases"
        words += ["", f"{kept}, on {where(results[0].about)}:", "", *table(results), "", OPEN]
        if results[0].about["backend"] != "cpu":  # a real network is what an accelerator is bought for
            words += ["", *(line for result in results if result.claim == "throughput" for line in speeds(result))]
    return MARK.sub(lambda match: "\n".join([match[1].rstrip(), *words, "", match[2]]), text)


def compared(a: pathlib.Path, b: pathlib.Path) -> list[tuple[str, str, str, str, str]]:
    """Claim, case, contender, ratio of B's median to A's, and what to say of it: of everything in both folders."""
    before, after = ({result.claim: result for result in read(each)} for each in (a, b))
    lines = []
    for claim in before.keys() & after.keys():
        old = {(row.case, row.unit): row for row in before[claim].rows}
        for row in after[claim].rows:
            known = old[row.case, row.unit].samples if (row.case, row.unit) in old else {}
            for name in row.samples.keys() & known.keys():
                ratio = _unpaired(known[name], row.samples[name], row.unit == "s")
                word = "more" if ratio.low > 1 else "less" if ratio.high < 1 else "the same, or inside the noise"
                lines.append((claim, f"{row.case} ({row.unit})", name, str(ratio), word))
    return sorted(lines)


def _unpaired(before: list[float], after: list[float], times: bool) -> m.Ratio:
    def ratio(old: Any, new: Any, axis: int = -1) -> Any:
        return np.median(new, axis=axis) / np.median(old, axis=axis)

    value = float(ratio(before, after))
    return m.interval(value, (before, after), ratio) if times else m.Ratio(value, value, value)
