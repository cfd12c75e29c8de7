"""The CPU kernel of the operation, in C++."""
