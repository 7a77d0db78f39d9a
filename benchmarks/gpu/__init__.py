"""Benchmarks of the demo voice on a GPU: ``python -m benchmarks.gpu --out DIR``.

Frames per second with graphs and eagerly, the share of the memory bandwidth, several worker
processes with and without MPS, and the memory that a worker takes. Needs neither a server nor a
package registry; a section that fails or overruns its deadline does not stop the others.
"""
