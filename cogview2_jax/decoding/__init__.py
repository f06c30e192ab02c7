"""Logits to tokens, and loops over them that know no model."""
