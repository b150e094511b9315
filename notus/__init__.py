"""Direct preference optimisation of Mistral-architecture models in raw PyTorch."""
