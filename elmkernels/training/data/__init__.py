"""From text to batches: sources, tokenizers, token files, packed sequences."""
