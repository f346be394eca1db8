"""Text to ids and back, and what a checkpoint says beside its shape and weights."""
