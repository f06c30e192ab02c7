"""The published checkpoints: reading their files, their tensor names, and `convert`."""
