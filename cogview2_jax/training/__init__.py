"""Training: options, one builder for each network, one loop."""
