"""Progress and results on a terminal, and reports: tables, figures, and an HTML page."""
