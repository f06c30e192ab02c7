"""The published networks at their full size."""
