"""What the doctor finds."""

from dsmr_mlx.doctor.finding import Finding, Status


def wrong(finding: Finding) -> bool:
    """Whether a finding says that something is wrong, and what to do."""
    assert (finding.status == Status.WRONG) == bool(finding.advice)
    return finding.status == Status.WRONG
