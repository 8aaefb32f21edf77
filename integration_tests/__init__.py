"""The whole line, from module to reset: every cell of the matrix, real guests, and machines that refuse something."""
