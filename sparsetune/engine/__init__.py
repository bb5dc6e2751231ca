"""Many trials at once: `pool.train` trains a list of settings without Ray, `actor` under it."""
