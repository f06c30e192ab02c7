"""The published code and its files: names, checkpoints."""
