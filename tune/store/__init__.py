"""The folder of a search: journal, rows, results. Needs no Ray."""
