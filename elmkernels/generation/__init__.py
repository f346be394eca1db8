"""Tokens: sessions, streams, sampling, and how a GPU decodes."""
