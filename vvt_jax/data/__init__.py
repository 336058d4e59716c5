"""Where examples come from (`sources`), how one image is prepared (`preprocess`, `augment`) and how
batches are made of them (`loader`).

Import the modules, not names from here: this package loads nothing heavy by itself.
"""
