"""Measurements by command: every number in the docs comes from one of these."""
