"""The Mistral architecture in plain PyTorch, its weights and its low-rank adapters.

intervals    the mask of a packed row as intervals of slots, for FlexAttention
attention    who attends to whom, and the backends that compute it
hf_config    the decoder's shape, from a Hugging Face folder's config.json
rope         the rotary position embedding
mistral      the decoder
host_copies  tensors copied to the host
hub          a model's folder: here, or from the Hugging Face hub
weights      safetensors folders in and out
lora         low-rank adapters
peft         adapters in PEFT's files, and merged into their base
"""
