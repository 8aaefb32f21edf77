"""A prepared module: its plan, its report, and the analysis behind both."""
