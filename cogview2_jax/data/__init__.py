"""Data: the procedural Scenes and the readers that feed training."""
