"""The host on wasmtime-py."""
