"""Monitoring of a run from another process: status file, live view and report."""

from relax.monitor.page import comparison_page, run_page, write_comparison, write_report
from relax.monitor.run_files import Run, read_run
from relax.monitor.status import TrainingStatusWriter, read_status

__all__ = [
    "Run",
    "TrainingStatusWriter",
    "comparison_page",
    "read_run",
    "read_status",
    "run_page",
    "write_comparison",
    "write_report",
]
