"""Watching a run from outside: the status file that it keeps, a live view of it, and its report."""

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
