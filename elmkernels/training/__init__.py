"""Training OpenELM: recipes, data, the loop, checkpoints; torch's own engine beyond one process."""
