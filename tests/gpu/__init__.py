"""What needs a GPU, and what can be said about GPU kernels without one.

``python -m tests.gpu`` runs everything on a machine with a GPU; ``python -m tests.gpu.offline``
compiles everything on a machine without.
"""
