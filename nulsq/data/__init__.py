"""Prepared data sets (manifest.py) and their loaders (loaders.py)."""

from nulsq.data.loaders import Loaders, Normalize, build_loader, build_loaders, check_data
from nulsq.data.manifest import DataSet

__all__ = ["DataSet", "Loaders", "Normalize", "build_loader", "build_loaders", "check_data"]
