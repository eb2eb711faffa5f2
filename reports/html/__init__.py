"""The audit report: one self-contained HTML file that needs no network and no script."""

from __future__ import annotations

from reports.html.render import render

__all__ = ["render"]
