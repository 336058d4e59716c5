"""Data sets that are made of archives and downloads, as array_record; see `vvt_jax.prepare`."""
