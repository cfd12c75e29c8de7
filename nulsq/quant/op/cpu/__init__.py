"""The CPU form of the operation: a C++ kernel, compiled where it runs."""
