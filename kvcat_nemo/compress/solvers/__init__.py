"""Numerical solvers that compressors use: bounded least squares, batched L-BFGS, orthogonal matching pursuit."""
