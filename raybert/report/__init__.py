"""The report of a run: one HTML file with everything in it, to read, send around and print.

stages.py          what a run's folder holds, as far as it is there
plots.py           curves and diagrams: matplotlib's SVG, in the page's colours
markup.py          elements that escape their text, and values as people write them
classification.py  what a classifier confuses
tuning.py          what a search found, and what it cost
page.py            the page itself
style.py           its look
"""

from raybert.report.page import check_report, write_report

__all__ = ["check_report", "write_report"]
