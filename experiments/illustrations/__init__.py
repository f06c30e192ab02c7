"""A bundle trained on open illustrations with English and Chinese names."""
