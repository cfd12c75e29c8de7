"""Checks of a job's nodes before it trains for hours: python -m launch.preflight."""
