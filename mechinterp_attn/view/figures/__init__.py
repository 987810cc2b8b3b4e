"""Plotly figures of results, one file per room; all share ``style``."""
