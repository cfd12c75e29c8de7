"""Prepares data sets: python -m data_prep digits|cifar10|cifar100|folder|imagenet --out DIR."""
