"""Stored results as a report to read: Markdown, plots, and the table in the README."""

import pathlib
import re

import matplotlib as mpl
import matplotlib.pyplot as plt

from . import _measure as m

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
MARK = re.compile(r"(<!-- benchmarks: begin -->\n).*?(<!-- benchmarks: end -->)", re.DOTALL)


def report(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `report.md` and the plots beside the results in a folder; gives what it wrote."""
    results = read(folder)
    plots = [path for result in results for path in plotted(result, folder)]
    page = folder / "report.md"
    page.write_text("\n".join(_page(results)) + "\n")
    return [page, *plots]


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


def _page(results: list[m.Result]) -> list[str]:
    lines = ["# What was measured", ""]
    lines += ["Medians; ratios are medians of paired ratios, with their 95 % confidence interval.", ""]
    for result in results:
        lines += [
            f"## {result.claim}",
            "",
            result.statement,
            "",
            f"`{result.about['command']}` on {where(result.about)}",
        ]
        lines += ["", f"![{result.claim}]({result.claim}.svg)"] if plottable(result) else []
        lines += ["", "| case | contender | median | quartiles | ratio | verdict |", "|---|---|---|---|---|---|"]
        for row in result.rows:
            found = m.ratios(row)
            for i, (name, samples) in enumerate(row.samples.items()):
                low, middle, high = (m.told(value, row.unit) for value in m.quartiles(samples))
                spread = f"{low} - {high}" if len(samples) > 1 else "exact"
                first = (row.case, m.verdict(row)) if i == 0 else ("", "")
                lines.append(f"| {first[0]} | {name} | {middle} | {spread} | {found.get(name, '')} | {first[1]} |")
        lines.append("")
    return lines


def plottable(result: m.Result) -> bool:
    """Whether there is anything to plot against."""
    return sum(row.x is not None and row.unit == "s" for row in result.rows) > 1


def plotted(result: m.Result, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws each contender's ratio to the baseline, with its interval; as PNG and SVG."""
    if not plottable(result):
        return []
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = result.claim  # the same picture is the same file
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    lines: dict[str, list[tuple[float, m.Ratio]]] = {}
    kinds = {_kind(row) for row in result.rows if row.x is not None}
    for row in result.rows:
        for name, ratio in m.ratios(row).items() if row.x is not None and row.unit == "s" else ():
            lines.setdefault(f"{name}, {_kind(row)}" if len(kinds) > 1 else name, []).append((row.x or 0.0, ratio))
    for name, points in lines.items():
        xs, found = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        spread = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
        axes.errorbar(xs, [each.value for each in found], spread, marker="o", capsize=3, label=name, linewidth=1)
    axes.axhline(1, color="black", linewidth=0.8)
    for bound in {bound for row in result.rows for bound in row.bounds.values()}:
        axes.axhline(bound, color="black", linestyle=":", linewidth=0.8, label=f"promised: {bound:g}")
    axes.set(xscale="log", xlabel=_axis(result), ylabel=f"time / {result.rows[-1].baseline}", title=result.claim)
    axes.legend(fontsize="small")
    paths = [folder / f"{result.claim}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    plt.close(figure)
    return paths


def _kind(row: m.Row) -> str:
    """What a case is called without the number that it varies."""
    return re.sub(r"^[\d ]*(steps, |leaves)?|, \d+ layers$", "", row.case) or row.case.split()[-1]


def _axis(result: m.Result) -> str:
    words = {"dispatch": "leaves", "scan": "steps in one dispatch", "tracing": "layers", "vmap": "width"}
    return words.get(result.claim, "")


def table(results: list[m.Result]) -> str:
    """What the README shows: each bounded claim, over all its cases."""
    lines = ["| claim | promised | measured | the baseline against itself | cases |", "|---|---|---|---|---|"]
    for result in results:
        bounded = [(row, name, bound) for row in result.rows for name, bound in row.bounds.items()]
        if not bounded:
            continue
        ours = [m.ratios(row)[name].value for row, name, _ in bounded]
        noise = [m.ratios(row)[m.AGAIN].value for row, _, _ in bounded if m.AGAIN in row.samples]
        promised = ", ".join(sorted({f"at most {bound:.2f}" for _, _, bound in bounded}))
        lines.append(f"| {result.claim} | {promised} | {_span(ours)} | {_span(noise)} | {len(bounded)} |")
    return "\n".join(lines)


def _span(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def readme(results: list[m.Result], text: str) -> str:
    """Puts the table between the README's marks."""
    words = (
        f"\nMedian ratios of time (memory: of bytes), lowest to highest over the cases, on {where(results[0].about)}:\n"
    )
    return MARK.sub(lambda match: f"{match[1]}{words}\n{table(results)}\n\n{match[2]}", text)
