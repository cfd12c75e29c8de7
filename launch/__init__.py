"""Starts runs and searches: python -m launch local train RECIPE --nproc 2. It runs commands, it is not a library."""
