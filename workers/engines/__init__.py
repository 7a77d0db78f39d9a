"""How a network is run: CUDA graphs for torch, a provider chain for ONNX Runtime."""
