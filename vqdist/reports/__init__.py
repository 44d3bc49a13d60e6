"""Reports of runs: numbers as a table and as curves, in a terminal or as a page for a browser. Imports no torch."""
