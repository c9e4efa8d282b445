"""The report of a run: one self-contained HTML file to read, share and print.

stage_files.py     reads a run's files, as far as they exist
elements.py        what the template renders: tables, tiles, figures, values as text
plots.py, tiles.py plots and tiles of a training run
classification.py  confusion matrix, scores per class, confident mistakes
search.py          tiles and tables of a hyperparameter search
search_plots.py    its plots
page.py            collects a section for each stage and renders them
templates/         the page's HTML and CSS
"""

from raybert.report.page import check_report, write_report

__all__ = ["check_report", "write_report"]
