"""Text to pictures: the networks, loops and samplers put together."""
