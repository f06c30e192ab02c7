"""Orders and rounds of iterative super-resolution, compared."""
