"""Initial step sizes and signs, from data."""
