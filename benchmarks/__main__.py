"""Runs claims, prints their tables and stores every sample: `python -m benchmarks [CLAIM ...]`.

`python -m benchmarks report` writes tables and plots of what is stored; `python -m benchmarks compare A B` compares two
folders of results.
"""

import argparse
import importlib
import os
import pathlib
import string
import sys
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "")  # whatever is there: an accelerator, else the CPU

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import _measure as m
from . import _plan

CLAIMS = (
    "recompilation",
    "dispatch",
    "scan",
    "tracing",
    "throughput",
    "memory",
    "vmap",
    "accumulation",
    "mesh",
    "nnx",
    "checks",
    "explain",
    "imports",
    "startup",
    "nonfinite",
)
HERE = pathlib.Path(__file__).parent
console = Console()


def main(arguments: list[str] | None = None) -> int:
    """Measures what was asked for; returns what the shell is told."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").replace("`", ""))
    parser.add_argument(
        "claims",
        nargs="*",
        metavar="CLAIM",
        help=f"one or more of: {', '.join(CLAIMS)}; all if none; or report; or compare A B",
    )
    effort = parser.add_mutually_exclusive_group()
    texts = {"smoke": "only prove that each runs", "quick": "a few minutes (default)", "full": "for the record"}
    for name, text in texts.items():
        effort.add_argument(f"--{name}", dest="effort", action="store_const", const=name, default="quick", help=text)
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where results go; --full: results/<device>")
    text = "stop in time: the most valuable cases first, each stored at once; with --smoke or --full of those sizes"
    parser.add_argument("--minutes", type=float, metavar="M", help=text)
    parser.add_argument("--resume", action="store_true", help="with --minutes: go on where a run into --out stopped")
    options = parser.parse_args(arguments)
    if options.claims == ["report"]:
        return report(options.out or HERE / "results" / m.folder_name())
    if options.claims[:1] == ["compare"]:
        if len(options.claims) != 3:
            parser.error("compare takes two folders of results: python -m benchmarks compare A B")
        return compare(*map(pathlib.Path, options.claims[1:]))
    unknown = sorted({*options.claims} - {*CLAIMS})
    if unknown:
        parser.error(f"no such claim: {', '.join(unknown)}; there are {', '.join(CLAIMS)}")

    if options.minutes:
        sizes = m.EFFORTS["lease" if options.effort == "quick" else options.effort]
        folder = options.out or HERE / "results" / m.folder_name()
        return planned(options.minutes, options.claims or list(CLAIMS), sizes, folder, options.resume)
    out = options.out or (HERE / "results" / m.folder_name() if options.effort == "full" else None)
    began = time.perf_counter()
    claims, results = options.claims or list(CLAIMS), list[m.Result]()
    columns = (SpinnerColumn(), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=len(claims))
        for name in claims:
            warnings.simplefilter("ignore")  # what other libraries deprecate is not ours to report
            result = run(name, m.EFFORTS[options.effort], lambda words: progress.update(task, description=words))
            results.append(result)
            show(result)
            if out:
                console.print(f"stored {os.path.relpath(m.store(result, out))}\n")
            progress.advance(task)
    show_summary(results)
    where = f"results in {os.path.relpath(out)}" if out else "nothing stored: --out DIR does"
    console.print(f"benchmarks: done in {time.perf_counter() - began:.0f} s on {m.about()['device']}, {where}")
    return 0


def planned(minutes: float, claims: list[str], effort: m.Effort, folder: pathlib.Path, resume: bool) -> int:
    """Measures for so many minutes; says what was stored and what was left out."""
    warnings.simplefilter("ignore")  # what other libraries deprecate is not ours to report
    began = time.perf_counter()
    plan = _plan.Plan(minutes, folder, claims)
    if resume:
        plan.resume()
        console.print(f"stored before: {sum(len(each.cases) for each in plan.results.values())} cases")
    for case in plan.run(effort, lambda words: None):
        console.print(f"stored {case}, {time.perf_counter() - began:.0f} s")
    for case in plan.left:
        console.print(f"left out, no time: {case}")
    show_summary([*plan.results.values()])
    console.print(
        f"benchmarks: planned {60 * minutes:.0f} s, used {time.perf_counter() - began:.0f} s on {m.about()['device']}, "
        f"{len(plan.left)} cases left out, results in {os.path.relpath(folder)}"
    )
    return 0


def report(folder: pathlib.Path) -> int:
    """Writes the report of stored results, and the README's tables if they are the project's own."""
    from . import _report

    for path in _report.report(folder):
        console.print(f"wrote {os.path.relpath(path)}")
    if folder.resolve().parent == _report.RESULTS:
        _report.README.write_text(_report.readme(_report.README.read_text()))
        console.print(f"wrote {os.path.relpath(_report.README)}")
    return 0


def compare(before: pathlib.Path, after: pathlib.Path) -> int:
    """Prints what takes more or less in the second folder than in the first."""
    from . import _report

    for name, folder in (("A", before), ("B", after)):
        console.print(f"{name}: {_report.where(_report.read(folder)[0].about)}")
    lines = _report.compared(before, after)
    table = Table(title="B / A: ratio of medians, 95 % interval", title_justify="left")
    for heading in ("claim", "case", "contender", "B / A", "B takes"):
        table.add_column(heading, overflow="fold")
    for line in lines:
        if line[-1] in ("more", "less"):
            table.add_row(*line)
    console.print(table)
    changed = sum(line[-1] in ("more", "less") for line in lines)
    console.print(f"compare: {changed} of {len(lines)} differ by more than the noise of these samples")
    return 0


def run(claim: str, effort: m.Effort, tell: m.Tell) -> m.Result:
    """Measures one claim."""
    module = importlib.import_module(f".{claim}", __package__)
    statement = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    rows = list(module.measure(effort, lambda words: tell(f"{claim}: {words}")))
    return m.Result(claim, statement, rows, effort.name)


def show(result: m.Result) -> None:
    """Prints a claim's table."""
    if result.claim == "recompilation":
        show_matrix(result)
        return
    table = Table(title=f"{result.claim}: {result.statement}", title_justify="left")
    for heading in ("case", "samples", "median", "quartiles", "ratio, 95 % interval"):
        table.add_column(heading, overflow="fold")
    for row in result.rows:
        table.add_row(f"[bold]{row.case}", end_section=False)
        for name, *told in m.contenders(row):
            table.add_row(f"  {name}", *told)
            if row.work:
                table.add_row("", "", "", "", f"[dim]{m.rate(row, name)}")
        for name, words in row.notes.items():
            table.add_row(f"  {name}", "", "", "", f"[dim]{words}")
        said = m.verdict(row)
        if said:
            table.add_row("", "", "", "", f"[italic]{said}")
        table.add_section()
    console.print(table)


def show_matrix(result: m.Result) -> None:
    """Prints compiles by situation and implementation, those beyond the fewest possible in red."""
    rows = [row for row in result.rows if row.unit == "compiles"]
    names = list(dict.fromkeys(name for row in rows for name in (*row.samples, *row.notes)))
    letters = string.ascii_uppercase[: len(names)]  # names would not fit beside each other
    table = Table(title=f"{result.claim}: {result.statement}", title_justify="left")
    table.add_column("compiles over 20 steps", no_wrap=True)
    for letter in letters:
        table.add_column(letter, justify="right")
    for row in rows:
        told = []
        for name in names:
            count = row.samples[name][0] if name in row.samples else None
            refused = row.notes.get(name, "").startswith("refuses")
            color = "red" if count is not None and count > row.work["possible"] else "green"
            told.append(f"[{color}]{count:.0f}" if count is not None else "x" if refused else "-")
        table.add_row(row.case, *told)
    console.print(table)
    console.print(", ".join(f"{letter}: {name}" for letter, name in zip(letters, names, strict=True)))
    console.print("x: refuses, -: has no such thing, or is not installed; the report has a sentence for each number")


def show_summary(results: list[m.Result]) -> None:
    """Prints a line for each claim that promises something."""
    table = Table(title="ratios, lowest to highest over the cases of a claim", title_justify="left")
    for heading in m.SUMMARY:
        table.add_column(heading, overflow="fold")
    for line in m.summary(results):
        table.add_row(*line)
    if table.row_count:
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
