"""Checkpoints on disk: headers, reading, staging, writing, resuming."""
