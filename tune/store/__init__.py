"""The folder of a search: its files, its journal, its results. Nothing here imports Ray."""
