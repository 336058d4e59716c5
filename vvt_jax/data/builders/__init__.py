"""Builders of array_record data sets from archives and downloads; see `vvt_jax.prepare`."""
