"""A step is looked at before it runs: each planted fault is found by its leaf, and a good step has no finding."""

import pytest

import flaxsplit as fs
from flaxsplit._refusals.explain import GROUPS, KINDS

from . import planted
from .flags import needs_donation

SILENT = (
    "ignore::flaxsplit.UntouchedStateWarning",  # of a fault that is planted, as the next
    "ignore:scatter inputs have incompatible types",
)
pytestmark = [needs_donation, *map(pytest.mark.filterwarnings, SILENT)]
PLANTED = [(kind, style) for kind, by_style in planted.WHERE.items() for style in by_style]


def explain(style: str, fault: str) -> fs.StepReport:
    step, carry, batch, args = planted.plant(style, fault)
    return fs.explain_step(step, carry, batch, *args)


def kinds(report: fs.StepReport) -> list[str]:
    return [each.kind for each in report.findings]


@pytest.mark.parametrize("style", planted.STYLES)
def test_a_good_step_has_no_finding(style: str) -> None:
    report = explain(style, "")
    assert kinds(report) == []
    assert "nothing to mend" in str(report)


@pytest.mark.parametrize(("kind", "style"), PLANTED)
def test_a_planted_fault_is_found_alone_and_by_name(kind: str, style: str) -> None:
    report = explain(style, kind)
    assert kinds(report) == [kind]
    (finding,) = report.findings
    assert any(line.startswith(planted.WHERE[kind][style]) for line in finding.leaves), finding.leaves
    assert finding.what == KINDS[kind].what
    assert finding.group in GROUPS
