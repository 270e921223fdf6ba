"""`make audit`: known vulnerabilities of what is installed beside this interpreter, looked up by pip-audit.

Fails where there is one; where no data can be reached, says so and does not.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

UNREACHED = ("ConnectionError", "ConnectTimeout", "Max retries exceeded", "ServiceError")


def looked_up(service: str) -> list[Any] | None:
    """What pip-audit reports of each distribution, or None where the service was not reached."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"]
        command += ["--vulnerability-service", service, "--format", "json", "--output", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if report.exists():
            return list(json.loads(report.read_text())["dependencies"])
        if not any(word in done.stderr for word in UNREACHED):
            raise SystemExit(f"audit: pip-audit failed:\n{done.stderr}")
        return None


def with_data(reports: list[Any] | None) -> list[Any]:
    """The distributions that the service knew."""
    return [each for each in reports or [] if "vulns" in each]


def verdict(reports: list[Any] | None) -> tuple[int, str]:
    """The exit status, and what to say; pip-audit passes what it found no data of, and that is no pass."""
    audited = with_data(reports)
    found = [f"  {each['name']} {each['version']}: {vuln['id']}" for each in audited for vuln in each["vulns"]]
    if found:
        return 1, "\n".join(["audit: known vulnerabilities:", *found])
    if not audited:
        return 0, "audit: skipped, no data on vulnerabilities was reached"
    return 0, f"audit: {len(audited)} of {len(reports or [])} distributions looked up, no known vulnerability"


def main() -> int:
    """Asks PyPI, and where it has no data OSV."""
    reports = looked_up("pypi")
    status, said = verdict(reports if with_data(reports) else looked_up("osv"))
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
