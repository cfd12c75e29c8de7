"""Checks of the nodes before hours are spent: python -m launch.preflight."""
