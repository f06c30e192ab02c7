"""Data for training: sources, preparation of records, reading of batches, and Scenes."""
