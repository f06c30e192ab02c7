"""Logits to tokens, and decoding loops that know no model."""
