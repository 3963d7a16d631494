"""What people see of a run: its progress on a terminal, and a report of tables, figures and a page."""
