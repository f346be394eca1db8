"""What one GPU can tell of this package in a few minutes, stage by stage."""
