"""What is claimed of GPUs, proven on one: ``python -m benchmarks.gpu --out DIR``.

Graphs against eager execution, frames a second, the share of the memory's bandwidth, several
worker processes with and without MPS, and the memory that a worker takes. Needs neither a server
nor a registry; a section that fails or overruns its deadline leaves the others to go on.
"""
