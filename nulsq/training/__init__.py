"""The parts of a training run; nulsq/train.py puts them together."""
