"""What the tools say of what they found."""

import pytest

from tools import audit

CLEAN = {"name": "jax", "version": "0.10.2", "vulns": []}
BAD = {"name": "numpy", "version": "1.0", "vulns": [{"id": "PYSEC-1"}]}
UNKNOWN = {"name": "optax", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("reports", "status", "said"),
    [
        (None, 0, "audit: skipped, no data on vulnerabilities was reached"),
        ([UNKNOWN], 0, "audit: skipped, no data on vulnerabilities was reached"),
        ([UNKNOWN, CLEAN], 0, "audit: 1 of 2 distributions looked up, no known vulnerability"),
        ([UNKNOWN, CLEAN, BAD], 1, "audit: known vulnerabilities:\n  numpy 1.0: PYSEC-1"),
    ],
)
def test_an_audit_without_data_is_no_pass(reports: list[object] | None, status: int, said: str) -> None:
    assert audit.verdict(reports) == (status, said)
