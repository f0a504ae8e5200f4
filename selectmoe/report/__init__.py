"""report.html of a selection: one file that shows what was kept and what was not."""
