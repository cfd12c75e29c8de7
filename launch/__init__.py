"""Starts runs and searches: python -m launch local train RECIPE --nproc 2. Speaks command lines, not objects."""
