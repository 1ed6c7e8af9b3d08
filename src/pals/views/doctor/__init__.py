"""`pals doctor`: facts of a node become findings with a status and a remedy, and findings become text or JSON."""

from pals.views.doctor.findings import findings, worst
from pals.views.doctor.render import as_json, print_findings

__all__ = ["as_json", "findings", "print_findings", "worst"]
