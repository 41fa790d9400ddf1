"""Merging: tensors of several models computed into one, piece by piece.

``methods.py`` has the formulas, ``blending.py`` runs one over tensors that lie in files, ``ratios.py`` says how much of
whom goes into which tensor.
"""
