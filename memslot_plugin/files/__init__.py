"""Guests outside of this process: the container format, and sharing by descriptors."""
