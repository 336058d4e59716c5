"""Sources of examples, preparation of images, and batches.

The examples come from `sources`, single images are prepared by `preprocess` and `augment`, and
`loader` makes the batches. Import these modules rather than names from the package, which loads
nothing heavy on its own.
"""
