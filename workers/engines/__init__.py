"""Engines that run a network: CUDA graphs for torch, a provider chain for ONNX Runtime."""
