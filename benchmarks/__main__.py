"""Runs claims, prints their tables and stores every sample: `python -m benchmarks [CLAIM ...]`."""

import argparse
import importlib
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "")  # whatever is there: an accelerator, else the CPU

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import _measure as m

CLAIMS = ("dispatch", "scan", "tracing", "memory", "vmap", "accumulation", "imports", "nnx")
HERE = pathlib.Path(__file__).parent
console = Console()


def main(arguments: list[str] | None = None) -> int:
    """Measures what was asked for; returns what the shell is told."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "claims", nargs="*", metavar="CLAIM", help=f"one or more of: {', '.join(CLAIMS)}; all if none; or report"
    )
    effort = parser.add_mutually_exclusive_group()
    for name in m.EFFORTS:
        text = {"smoke": "only prove that each runs", "quick": "a few minutes (default)", "full": "for the record"}[
            name
        ]
        effort.add_argument(f"--{name}", dest="effort", action="store_const", const=name, default="quick", help=text)
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where results go; --full: results/<device>")
    options = parser.parse_args(arguments)
    if options.claims == ["report"]:
        return report(options.out or HERE / "results" / m.folder_name())
    unknown = sorted({*options.claims} - {*CLAIMS})
    if unknown:
        parser.error(f"no such claim: {', '.join(unknown)}; there are {', '.join(CLAIMS)}")

    out = options.out or (HERE / "results" / m.folder_name() if options.effort == "full" else None)
    began = time.perf_counter()
    for name in options.claims or CLAIMS:
        result = run(name, m.EFFORTS[options.effort])
        show(result)
        if out:
            console.print(f"stored {os.path.relpath(m.store(result, out))}\n")
    where = f"results in {os.path.relpath(out)}" if out else "nothing stored: --out DIR does"
    console.print(f"benchmarks: done in {time.perf_counter() - began:.0f} s on {m.about()['device']}, {where}")
    return 0


def report(folder: pathlib.Path) -> int:
    """Writes the report of stored results, and the README's table if they are the project's own."""
    from . import _report

    for path in _report.report(folder):
        console.print(f"wrote {os.path.relpath(path)}")
    if folder.resolve() == HERE / "results" / "cpu":
        _report.README.write_text(_report.readme(_report.read(folder), _report.README.read_text()))
        console.print(f"wrote {os.path.relpath(_report.README)}")
    return 0


def run(claim: str, effort: m.Effort) -> m.Result:
    """Measures one claim under a progress bar."""
    module = importlib.import_module(f".{claim}", __package__)
    statement = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(claim, total=None)
        rows = list(module.measure(effort, lambda words: progress.update(task, description=f"{claim}: {words}")))
    return m.Result(claim, statement, rows, effort.name)


def show(result: m.Result) -> None:
    """Prints a claim's table."""
    table = Table(title=f"{result.claim}: {result.statement}", title_justify="left")
    for heading in ("case", "median", "quartiles", "ratio, 95 % interval"):
        table.add_column(heading, overflow="fold")
    for row in result.rows:
        found = m.ratios(row)
        table.add_row(f"[bold]{row.case}", end_section=False)
        for name, samples in row.samples.items():
            low, middle, high = (m.told(value, row.unit) for value in m.quartiles(samples))
            ratio = str(found[name]) if name in found else "1" if len(row.samples) > 1 else ""
            table.add_row(f"  {name}", middle, f"{low} - {high}" if len(samples) > 1 else "exact", ratio)
        said = m.verdict(row)
        if said:
            table.add_row("", "", "", f"[italic]{said}")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
