"""The three transformers and what they are given."""
