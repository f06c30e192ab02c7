"""Training of all networks: the options, a builder for each network, one loop."""
