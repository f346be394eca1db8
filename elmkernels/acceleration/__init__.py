"""Kernels into models: accelerate, restore, the fused modules, the families of models it knows."""
