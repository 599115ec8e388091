"""Results as a page that reads well on paper, in the dark and on a phone."""

from kvcat_nemo.evaluate.report.page import read_results, write_report

__all__ = ["read_results", "write_report"]
