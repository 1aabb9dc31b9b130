"""`dsmr-mlx doctor`: check this machine, and measure its speed."""

import argparse
import os
from typing import TYPE_CHECKING

from dsmr_mlx.cli.common import add_command, print_json
from dsmr_mlx.cli.console import err, out
from dsmr_mlx.common.errors import UserError

if TYPE_CHECKING:
    from dsmr_mlx.doctor.finding import Finding


def add(commands) -> None:
    """Add the parser of the command."""
    p = add_command(commands, "doctor", run, "dsmr-mlx doctor", "dsmr-mlx doctor --full --json > doctor.json")
    p.add_argument("--full", action="store_true", help="take ten minutes instead of one: more sizes, lengths, options")
    p.add_argument("--json", action="store_true", help="print one block of JSON, to be pasted into a report")


def run(a: argparse.Namespace) -> None:
    """Run all checks. Raises `UserError`, so that the exit code is 2, if something is wrong."""
    # Before MLX is imported: the 10 bits of TF32 would look like errors. Speeds are measured without it, too.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from dsmr_mlx.doctor import examine

    findings = []
    for finding in examine(a.full):
        findings.append(finding)
        if a.json:
            err.print(f"{finding.name}: {finding.status.value}")
        else:
            show(finding)
    if a.json:
        print_json({finding.name: finding.to_dict() for finding in findings})
    if wrong := [finding.name for finding in findings if finding.status == "wrong"]:
        raise UserError(f"something is wrong: {', '.join(wrong)}")


def show(finding: "Finding") -> None:
    """Show a finding as one or two lines."""
    out.print(f"{finding.status.value:<7}{finding.name}: {finding.text}")
    if finding.advice:
        out.print(f"{'':7}→ {finding.advice}")
