"""Benchmarks: Liubai beside its peers on one machine, in one run. Not part of the package.

``python -m bench.run`` compares, ``python -m bench.zero`` tabulates the R1-Zero recipe, ``python -m
bench.seeds`` any recipe over several seeds, ``python -m bench.memory`` watches any command, ``python -m
bench.peers`` makes the environment for the first.
"""
