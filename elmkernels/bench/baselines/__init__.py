"""Whole models of others, or written for torch's own operations, that ours are measured against."""
