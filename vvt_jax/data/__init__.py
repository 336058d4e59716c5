"""Sources of examples (`sources`), preparation of images (`preprocess`, `augment`) and batching
(`loader`).

Import the modules instead of names from this package, which loads nothing heavy on its own.
"""
