"""Cluster sampling beside top-k and nucleus sampling, and textual attention."""
