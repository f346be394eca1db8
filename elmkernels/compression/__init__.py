"""Changing the weights of a model in place: quantize, pack, unpack."""
