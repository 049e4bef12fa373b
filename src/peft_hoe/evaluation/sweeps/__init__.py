"""A preference sweep: how it runs, what it found, and the files that it is kept in."""
