"""The Mistral architecture in plain PyTorch, its weights and its low-rank adapters.

attention  who attends to whom, and the backends that compute it
mistral    the decoder
weights    safetensors folders in and out
lora       low-rank adapters, and PEFT's files
"""
