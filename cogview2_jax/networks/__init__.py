"""The three transformers, and the tokens, positions and masks that they are given."""
