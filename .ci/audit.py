"""Audits this project: known vulnerabilities of its packages (pip-audit), and its code (bandit).

Findings that are explained in audit.toml pass; any other one, and any explanation that explains
nothing any more, fails. Packages that the vulnerability service could not be asked about fail too:
an audit that did not look must not look clean.

    python .ci/audit.py [--service pypi|osv] [--code-only]

Exit status: 0 clean, 1 findings, 2 some packages could not be looked up.
"""

import argparse
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / ".ci" / "audit.toml"
PACKAGES = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines")
_TIMEOUT_S = 900


def unexplained(
    findings: Sequence[tuple[str, str, str]], explained: Sequence[Mapping[str, str]]
) -> tuple[list[str], list[str]]:
    """Compares findings with explanations.

    Args:
        findings: (id, place, words); the place is a file of the project, or a package.
        explained: Records with `id`, `reason` and, where it is meant for one place, `place`.

    Returns:
        Findings without an explanation, and explanations without a finding.
    """
    used: set[int] = set()
    left: list[str] = []
    for name, place, words in findings:
        fitting = [
            number
            for number, one in enumerate(explained)
            if one["id"] == name and one.get("place", place) == place and one["reason"].strip()
        ]
        used.update(fitting)
        if not fitting:
            left.append(f"{name} {place}: {words}")
    stale = [
        f"{one['id']} {one.get('place', '')}: no such finding any more"
        for number, one in enumerate(explained)
        if number not in used
    ]
    return left, stale


def code_findings(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Findings of bandit's JSON report."""
    return [
        (
            one["test_id"],
            one["filename"].removeprefix("./"),
            f"line {one['line_number']}: {one['issue_text']}",
        )
        for one in report["results"]
    ]


def package_findings(
    report: Mapping[str, Any],
) -> tuple[list[tuple[str, str, str]], dict[str, str]]:
    """Findings of pip-audit's JSON report, and why packages were not looked up, by package."""
    found: list[tuple[str, str, str]] = []
    not_looked_up: dict[str, str] = {}
    for package in report["dependencies"]:
        if "skip_reason" in package:
            not_looked_up[package["name"]] = package["skip_reason"]
        for one in package.get("vulns", ()):
            fixed = ", ".join(one.get("fix_versions", ())) or "no version"
            words = f"{package['version']}, fixed in {fixed}"
            found.append((one["id"], package["name"], words))
    return found, not_looked_up


def _json_of(command: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """JSON that a tool prints, or None and what it said instead."""
    try:
        ended = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    try:
        return json.loads(ended.stdout), ""
    except ValueError:
        return None, ended.stderr.strip()[-500:] or f"exit status {ended.returncode}, no JSON"


def main(arguments: Sequence[str]) -> int:
    """Runs both tools and prints the judgement."""
    parser = argparse.ArgumentParser(description="Audit packages and code.")
    parser.add_argument("--service", default="pypi", choices=("pypi", "osv"))
    parser.add_argument("--code-only", action="store_true", help="do not ask about packages")
    options = parser.parse_args(arguments)
    explained = tomllib.loads(EXPLAINED.read_text(encoding="utf-8"))
    tool = [sys.executable, "-m"]
    report, said = _json_of([*tool, "bandit", "-q", "-f", "json", "-r", *PACKAGES])
    if report is None:
        print(f"code: bandit did not run: {said}")
        return 2
    if report.get("errors"):
        print(f"code: bandit could not read {report['errors']}")
        return 2
    found = code_findings(report)
    left, stale = unexplained(found, explained.get("code", []))
    print(f"code: {len(found)} findings of bandit, {len(found) - len(left)} explained")
    missing: dict[str, str] = {}
    if not options.code_only:
        command = [*tool, "pip_audit", "-s", options.service, "-r", "constraints.txt", "--no-deps"]
        command += ["--disable-pip", "--progress-spinner", "off", "-f", "json"]
        report, said = _json_of(command)
        if report is None:
            print(f"packages: NOT LOOKED UP at {options.service}: {said}")
            missing["all"] = said
        else:
            found, missing = package_findings(report)
            number = len(report["dependencies"])
            more, gone = unexplained(found, explained.get("package", []))
            left += more
            # What could not be looked up says nothing about an explanation.
            stale += [] if missing else gone
            print(f"packages: {number - len(missing)} of {number} looked up at {options.service}")
            if missing:
                name, reason = next(iter(missing.items()))
                print(f"packages: NOT LOOKED UP: {len(missing)}, such as {name}: {reason}")
    for line in (*left, *stale):
        print(f"  {line}")
    return 1 if left or stale else 2 if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
