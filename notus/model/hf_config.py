"""The decoder's shape, from the config.json of a Hugging Face model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError, safe_open

from notus.errors import UserError
from notus.files import read_object
from notus.strict import Bound, NonNegative, Positive, keys_of, parse_part, show

ARCHITECTURES = (
    "MistralForCausalLM",
    "MinistralForCausalLM",
    "Ministral3ForCausalLM",
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
# A vision model of which the decoder is read; that one's class by text_config's model_type.
TOWER = "Mistral3ForConditionalGeneration"
TOWER_CLASSES = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
# What a model of another architecture is, by an entry of its config.json.
OTHER_KINDS = {
    "kv_lora_rank": "multi-head latent attention",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "vision_config": "a vision tower",
}
FULL, SLIDING = "full_attention", "sliding_attention"
LAYERED = ("MinistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # read layer_types
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Far above every model; within them no product of three sizes overflows, and a model without
# storage is built in seconds.
Size = Annotated[int, Bound("an integer from 1 to 1048576", lambda x: 1 <= x <= 2**20)]
Layers = Annotated[int, Bound("an integer from 1 to 1024", lambda x: 1 <= x <= 1024)]
Span = Annotated[int, Bound("an integer from 1 to 2147483647", lambda x: 1 <= x < 2**31)]
# Of YaRN; within them, and above a base of 1, the pair that turns so often is a finite number.
Turns = Annotated[float, Bound("a number from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6)]
Base = Annotated[float, Bound("a number above 1", lambda x: x > 1)]
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
class Yarn:
    """YaRN's stretching of the rotary embedding (arXiv 2309.00071), "rope_type": "yarn".

    llama_4_scaling_beta: of Ministral 3's query scale; 0: queries are not scaled.
    """

    factor: Positive
    original_max_position_embeddings: Span
    beta_fast: Turns = 32.0
    beta_slow: Turns = 1.0
    attention_factor: Positive | None = None  # null: from factor, mscale and mscale_all_dim
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    truncate: bool = True
    llama_4_scaling_beta: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything in a model's config.json that the decoder depends on.

    A field has the name of its entry there, if it has one. One that is added later needs a default,
    the value with which the decoder computes what it did before: shapes recorded without the field
    then have it.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size  # in config.json by default num_attention_heads
    head_dim: Even  # in config.json by default hidden_size / num_attention_heads
    rms_norm_eps: Positive
    rope_theta: Base = 10000.0
    rope_scaling: Llama3Rope | None = None
    sliding_window: Span | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    yarn: Yarn | None = None  # in config.json among the rope settings
    qkv_bias: bool = False  # Qwen2's: attention_bias without the output's
    qk_norm: bool = False  # Qwen3's


def has_vision(folder: Path) -> bool:
    """Whether a folder that `decoder_config` reads holds a vision tower too."""
    return architecture_of(read_object(folder / "config.json")) == TOWER


def decoder_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder that holds nothing but the decoder of `folder`.

    It is `folder`'s own, unless that has a vision tower too. Raises UserError for a missing or
    unreadable file, and for a tower with another decoder than TOWER_CLASSES.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
    config = read_object(path)
    if architecture_of(config) != TOWER:
        return config
    text = config.get("text_config")
    kind = text.get("model_type") if isinstance(text, dict) else None
    if kind not in tuple(TOWER_CLASSES):
        raise UserError(
            f"{path}: text_config.model_type is {kind or 'none named'}{_other_kind(text)}, "
            f"expected one of {', '.join(TOWER_CLASSES)}"
        )
    outer = ("quantization_config", "dtype", "torch_dtype", "bos_token_id", "eos_token_id")
    # Published files contradict each other and their weights. As in transformers, a head that is
    # stored is not tied.
    tied = [part.get("tie_word_embeddings", False) for part in (config, text)]
    return {
        **{key: config[key] for key in outer if key in config},
        **text,
        "architectures": [TOWER_CLASSES[kind]],
        "tie_word_embeddings": any(tied) and not _stores_head(folder),
    }


def read_shape(folder: Path) -> ModelShape:
    """The decoder's shape from `folder`/config.json.

    Raises UserError for a missing or unreadable file, an architecture that is not one of
    ARCHITECTURES or TOWER, a missing or mistyped entry, numbers that make no decoder, quantised
    weights, and settings that this decoder does not compute (another activation or rope scaling,
    layers with different windows).
    """
    path = folder / "config.json"
    config = decoder_config(folder)
    found = architecture_of(config)
    if found is None and (folder / "final/config.json").is_file():
        raise UserError(f"{folder}: the folder of a run; expected its model, {folder / 'final'}")
    if found not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture is {found or 'none named'}{_other_kind(config)}, expected one "
            f"of {', '.join((*ARCHITECTURES, TOWER))}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        fp8 = "; Mistral publishes them in the repository whose name ends in -BF16"
        raise UserError(
            f"{path}: quantization_config found{f' ({method})' if method else ''}, expected "
            f"weights in float32, bfloat16 or float16{fp8 if method == 'fp8' else ''}"
        )
    config |= {
        "sliding_window": _window(config, found, path),
        "qkv_bias": found == "Qwen2ForCausalLM",
        "qk_norm": found == "Qwen3ForCausalLM",
    }
    _flatten_rope(config, found, path)
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


def architecture_of(config: dict[str, Any]) -> Any:
    """The class that a config.json names, or whatever else it has there; None without one."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named else named


def _other_kind(config: Any) -> str:
    """The parts of an unsupported model that the decoder lacks, in words; "" if unknown."""
    entries = config if isinstance(config, dict) else {}
    kinds = dict.fromkeys(kind for entry, kind in OTHER_KINDS.items() if entries.get(entry))
    return f" ({' and '.join(kinds)})" if kinds else ""


def _stores_head(folder: Path) -> bool:
    """Whether the folder's weights, if it has any, hold an output projection."""
    names: Any = ()
    try:
        if (folder / INDEX).is_file():
            found = read_object(folder / INDEX).get("weight_map")
            names = found if isinstance(found, dict) else ()
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as handle:
                names = list(handle.keys())
    except (OSError, SafetensorError):
        pass  # named when the weights are opened
    return any(name.endswith("lm_head.weight") for name in names)


def _window(config: dict[str, Any], architecture: str, path: Path) -> Any:
    """The sliding window of all layers, None for full attention. Raises UserError for a mixture."""
    if architecture == "LlamaForCausalLM":  # it has no window: transformers ignores the entry too
        return None
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if architecture.startswith("Qwen"):
        window = window if config.get("use_sliding_window") else None
        full, layers = config.get("max_window_layers", 28), config.get("num_hidden_layers")
        if kinds is None and window is not None and type(full) is type(layers) is int:
            kinds = [FULL] * (full > 0) + [SLIDING] * (layers > full)
    if kinds is None:
        return window
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == [FULL] * len(kinds) and (window is None or architecture in LAYERED):
        return None
    if kinds == [SLIDING] * len(kinds) and window is not None:
        return window
    raise UserError(
        f"{path}: layer_types: found {show(sorted(set(map(str, kinds))))} with sliding_window "
        f"{show(window)}, expected the same window in all layers, or in none"
    )


def _flatten_rope(config: dict[str, Any], architecture: str, path: Path) -> None:
    """Move what is read of the rope settings to the places that ModelShape gives it."""
    # Since transformers 5 the base frequency is among the rope settings.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(entry, dict) for entry in rope.values()):
        raise UserError(
            f"{path}: the rope settings are {rope!r}, expected an object for all layers"
        )
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    kind, config["rope_scaling"] = rope.get("rope_type", rope.get("type", "default")), None
    config["yarn"] = None
    scaled = architecture == "Ministral3ForCausalLM"  # the others ignore llama_4_scaling_beta
    if kind == "llama3":
        config["rope_scaling"] = {key: rope[key] for key in keys_of(Llama3Rope) if key in rope}
    elif kind == "yarn":
        entries = {key: rope[key] for key in keys_of(Yarn) if rope.get(key) is not None}
        original = config.get("original_max_position_embeddings")  # it has priority
        original = original or entries.get("original_max_position_embeddings")
        original = original or config.get("max_position_embeddings")
        config["yarn"] = entries | {"original_max_position_embeddings": original}
        if not scaled:
            config["yarn"].pop("llama_4_scaling_beta", None)
    elif kind != "default":
        raise UserError(f"{path}: rope scaling {kind!r} found, expected none, 'llama3' or 'yarn'")
    if scaled and "llama_4_scaling_beta" not in (config["yarn"] or {}):
        raise UserError(
            f"{path}: rope scaling {kind!r} without llama_4_scaling_beta found, expected the "
            "'yarn' settings of Ministral 3"
        )
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1):
        raise UserError(f"{path}: partial_rotary_factor: found {show(rotated)}, expected 1")
