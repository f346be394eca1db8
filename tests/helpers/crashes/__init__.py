"""Training whose processes are killed."""
