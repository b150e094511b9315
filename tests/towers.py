"""Vision models whose decoder is trained: random ones, as transformers saves them."""

from pathlib import Path

import torch
import transformers

# Ministral 3's rope settings, but for a context short enough to leave, and a base whose ramp from
# kept to stretched frequencies covers several pairs of small heads.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e3,
    "factor": 16.0,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.1,
}


def write_tower(
    folder: Path, decoder: transformers.PretrainedConfig, **options: object
) -> transformers.Mistral3ForConditionalGeneration:
    """A random Mistral3ForConditionalGeneration with this decoder, saved in `folder`."""
    vision = transformers.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=8,
        image_size=16,
        patch_size=8,
    )
    torch.manual_seed(0)
    config = transformers.Mistral3Config(vision_config=vision, text_config=decoder, **options)
    model = transformers.Mistral3ForConditionalGeneration(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model.eval()
