"""The report of a run: one HTML page that needs nothing but itself."""

from relax.report.page import comparison_page, run_page, write_comparison, write_report
from relax.report.run import Run, read_run

__all__ = ["Run", "comparison_page", "read_run", "run_page", "write_comparison", "write_report"]
