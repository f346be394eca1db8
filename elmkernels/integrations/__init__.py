"""elmkernels inside other projects, one file or folder each.

A module here imports its project late or at its own import, so that nothing else needs it.
"""
