"""The decoder's shape, from the config.json of a Hugging Face model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from notus.errors import UserError
from notus.files import read_object
from notus.strict import Bound, Positive, keys_of, parse_part

ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
# Far above every model; within them no product of three sizes overflows, and a model without
# storage is built in seconds.
Size = Annotated[int, Bound("an integer from 1 to 1048576", lambda x: 1 <= x <= 2**20)]
Layers = Annotated[int, Bound("an integer from 1 to 1024", lambda x: 1 <= x <= 1024)]
Span = Annotated[int, Bound("an integer from 1 to 2147483647", lambda x: 1 <= x < 2**31)]
Even = Annotated[
    int, Bound("an even number from 2 to 1048576", lambda x: 2 <= x <= 2**20 and x % 2 == 0)
]


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Frequency-dependent stretching of the rotary embedding (Llama 3.1, "rope_type": "llama3")."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Span


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything in a model's config.json that the decoder depends on.

    A field has the name of its entry there. One that is added later needs a default, the value with
    which the decoder computes what it did before: shapes recorded without the field then have it.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size  # in config.json by default num_attention_heads
    head_dim: Even  # in config.json by default hidden_size / num_attention_heads
    rms_norm_eps: Positive
    rope_theta: Positive = 10000.0
    rope_scaling: Llama3Rope | None = None
    sliding_window: Span | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


def read_shape(folder: Path) -> ModelShape:
    """The decoder's shape from `folder`/config.json.

    Raises UserError for a missing or unreadable file, an architecture that is not one of
    ARCHITECTURES, a missing or mistyped entry, numbers that make no decoder, quantised weights, and
    settings that this decoder does not compute (another activation or rope scaling).
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    config = read_object(path)
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if found not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture is {found or 'none named'}, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config found, expected weights in float32, bfloat16 or float16"
        )
    if found == "LlamaForCausalLM":  # it has no window: transformers ignores the entry too
        config.pop("sliding_window", None)
    # Since transformers 5 the base frequency is among the rope settings.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rope settings are {rope!r}, expected an object")
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    kind, config["rope_scaling"] = rope.get("rope_type", rope.get("type", "default")), None
    if kind == "llama3":
        config["rope_scaling"] = {key: rope[key] for key in keys_of(Llama3Rope) if key in rope}
    elif kind != "default":
        raise UserError(f"{path}: rope scaling {kind!r} found, expected none or 'llama3'")
    heads, hidden_size = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = heads
    if config.get("head_dim") is None and type(hidden_size) is type(heads) is int and heads > 0:
        config["head_dim"] = hidden_size // heads
    shape = parse_part(config, ModelShape, path)
    if heads % shape.num_key_value_heads:
        raise UserError(
            f"{path}: num_key_value_heads: found {shape.num_key_value_heads}, expected a divisor "
            f"of num_attention_heads, {heads}"
        )
    return shape
