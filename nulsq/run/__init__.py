"""The run directory: recipe, records, checkpoints, and how the run ended."""
