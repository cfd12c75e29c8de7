"""Seconds as people read them."""


def duration(seconds: float) -> str:
    """90 -> 1m30s, 7200 -> 2h00m"""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
