"""The host on wasmer-python 1.1.0."""
