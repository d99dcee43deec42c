"""Benchmarks: Liubai beside its peers on one machine, in one run. Not part of the package.

``python -m bench.run`` compares, ``python -m bench.zero`` tabulates the R1-Zero recipe, ``python -m
bench.memory`` watches any command, ``python -m bench.peers`` makes the environment for all three.
"""
