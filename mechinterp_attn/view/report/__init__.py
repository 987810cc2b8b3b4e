"""The circuit report: one model on one prompt, in one HTML file that opens offline."""

from mechinterp_attn.view.report.build import Report, report

__all__ = ["Report", "report"]
