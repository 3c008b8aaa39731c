"""The same results sooner: each module here has a plain counterpart that it is tested against."""
