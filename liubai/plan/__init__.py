"""Planning before anything runs: what fits, how fast it may be, and how to share the machines out."""
