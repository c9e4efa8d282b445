"""The report of a run: one self-contained HTML file to read, share and print.

stage_files.py     reads a run's files, as far as they exist
elements.py        what the template renders: tables, tiles, figures, values as text
plots.py, tiles.py plots and tiles of a training run
search.py          tiles, tables and plots of a hyperparameter search
page.py            a section for each stage, with scores, events and mistakes
templates/         the page's HTML and CSS
"""

from raybert.report.page import check_report, write_report

__all__ = ["check_report", "write_report"]
