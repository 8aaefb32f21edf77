"""Tests from module to reset: each cell of the matrix, real guests, and machines that refuse something."""
