"""Hyperparameter search on Ray Tune: `python -m tune.search configs/search/NAME.yaml`."""
