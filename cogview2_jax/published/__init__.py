"""The published checkpoints: tensor names and their parameters."""
