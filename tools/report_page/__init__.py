"""The HTML page of tools/report.py: reading runs, thinning their curves, drawing the page."""
