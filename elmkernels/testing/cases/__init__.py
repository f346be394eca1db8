"""Inputs to the ops: the shapes of the four models, and the awkward ones."""
