"""What a sweep is shown as: measures, tables, plots, a page, and plain JSON."""
