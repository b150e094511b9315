"""Shapes from config.json, and shapes that were recorded earlier."""

import json
from dataclasses import asdict

import pytest
import transformers
from towers import YARN

from notus.errors import UserError
from notus.model.hf_config import Llama3Rope, ModelShape, read_shape
from notus.model.mistral import count_parameters
from notus.strict import parse

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}
MINISTRAL3 = {"architectures": ["Ministral3ForCausalLM"]}
TOWER = {"architectures": ["Mistral3ForConditionalGeneration"]}
HEAD = "language_model.lm_head.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": None}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def read(folder, **changes) -> ModelShape:
    """The shape of a config.json with changed entries; `...` removes one."""
    config = {"architectures": ["MistralForCausalLM"], **BASE} | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return read_shape(folder)


def test_a_recorded_shape_is_read_back(tmp_path):
    yarn = MINISTRAL3 | {"rope_parameters": YARN}
    for changes in ({}, yarn, {"rope_scaling": LLAMA3, "rope_theta": 5e5, "sliding_window": 7}):
        shape = read(tmp_path, **changes)
        recorded = json.loads(json.dumps(asdict(shape)))
        assert parse(recorded, ModelShape) == shape
    assert shape.rope_scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )


def test_the_folder_of_a_run_is_not_its_model(tmp_path):
    (tmp_path / "final").mkdir()
    read(tmp_path / "final")
    with pytest.raises(UserError, match="the folder of a run; expected its model, .*/final$"):
        read(tmp_path, architectures=...)


def test_a_shape_recorded_before_a_field_existed_has_its_default(tmp_path):
    shape = read(tmp_path)
    recorded = asdict(shape)
    for later in ("mlp_bias", "rope_scaling", "sliding_window", "yarn", "qkv_bias", "qk_norm"):
        del recorded[later]
    assert parse(recorded, ModelShape) == shape
    with pytest.raises(UserError, match="^model_shape.q_norm: unknown key"):
        parse(recorded | {"q_norm": True}, ModelShape, "model_shape")
    with pytest.raises(UserError, match='^start.hidden_size: found "64", expected an integer'):
        parse(recorded | {"hidden_size": "64"}, ModelShape, "start")


def test_defaults_of_a_config_file(tmp_path):
    shape = read(tmp_path, num_key_value_heads=..., head_dim=None, sliding_window=None)
    assert (shape.num_key_value_heads, shape.head_dim) == (4, 16)
    assert (shape.rope_theta, shape.sliding_window) == (10000.0, None)
    llama = read(tmp_path, architectures=["LlamaForCausalLM"], sliding_window=4)
    assert llama.sliding_window is None


def test_a_config_file_of_2023_reads_the_same_as_a_new_one(tmp_path):
    old = {
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    shape = read_shape(tmp_path)
    assert count_parameters(shape) == 7_241_732_096
    assert (shape.head_dim, shape.rope_theta, shape.sliding_window) == (128, 10000.0, 4096)
    new = tmp_path / "new"
    config = transformers.MistralConfig.from_pretrained(tmp_path)
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(new)
    assert read_shape(new) == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture is GPT2LMHeadModel"),
        ({"architectures": ...}, "none named"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vocab_size": ...}, "vocab_size: missing, expected an integer from 1 to 1048576"),
        ({"hidden_size": ...}, "hidden_size: missing, expected an integer from 1 to 1048576"),
        ({"hidden_size": 10**30}, "hidden_size: found 10{30}, expected an integer from 1 to"),
        ({"intermediate_size": 2**63}, "intermediate_size: found 9223372036854775808, expected"),
        ({"vocab_size": 2**20 + 1}, "vocab_size: found 1048577, expected an integer from 1 to"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers: found 100000, .* from 1 to 1024"),
        ({"sliding_window": 10**30}, "sliding_window: found 10{30}, .* from 1 to 2147483647"),
        ({"head_dim": 2**40}, "head_dim: found 1099511627776, expected an even number from 2 to"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 10**400}},
            "rope_scaling.original_max_position_embeddings: found 10{56}",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads: found 0, expected an integer from 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor of .*, 4"),
        ({"head_dim": 7}, "head_dim: found 7, expected an even number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: found NaN, expected a finite number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1, expected true or false"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope scaling 'dynamic' found, expected none"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn.factor: missing, expected a number above"),
        (
            {"rope_parameters": YARN | {"rope_theta": 1}},
            "rope_theta: found 1.0, expected .* above 1",
        ),
        (
            {"rope_parameters": YARN | {"beta_fast": 1e308}},
            r"yarn.beta_fast: found 1e\+308, expected a number from 1e-6 to 1e6",
        ),
        (MINISTRAL3, "rope scaling 'default' without llama_4_scaling_beta found"),
        (
            MINISTRAL3 | {"rope_parameters": {k: v for k, v in YARN.items() if "llama" not in k}},
            "rope scaling 'yarn' without llama_4_scaling_beta found",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
        (
            {"layer_types": ["full_attention"] * 3, "sliding_window": 4},
            "with sliding_window 4, exp",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types: .* with sliding_window null"),
        (
            QWEN2
            | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
            | {"sliding_window": 4, "use_sliding_window": True},
            r'layer_types: found \["full_attention", "sliding_attention"\] with sliding_window 4',
        ),
        (
            QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "expected the same window in all layers, or in none",
        ),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8},
            r"architecture is MixtralForCausalLM \(a mixture of experts\), expected one of Mistral",
        ),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 64, "n_routed_experts": 8},
            r"DeepseekV3ForCausalLM \(multi-head latent attention and a mixture of experts\)",
        ),
        (
            {"architectures": ["Qwen3VLForConditionalGeneration"], "vision_config": {"depth": 1}},
            r"Qwen3VLForConditionalGeneration \(a vision tower\), expected",
        ),
        (
            TOWER | {"text_config": {"model_type": "mistral4", "kv_lora_rank": 64}},
            r"model_type is mistral4 \(multi-head latent attention\), expected one of mistral, ",
        ),
        ({"layer_types": 3}, r'layer_types: found \["3"\] with sliding_window null'),
        ({"rope_parameters": {"full_attention": YARN}}, "expected an object for all layers"),
        (TOWER, "text_config.model_type is none named, expected one of mistral, ministral3"),
        (
            TOWER | {"text_config": {"model_type": "mistral"}, "quantization_config": FP8},
            r"found \(fp8\), .* publishes them in the repository whose name ends in -BF16",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, r"found \(awq\), .* or float16$"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling.factor: found 0.0, expected a"),
        ({"rope_parameters": [1]}, r"the rope settings are \[1\], expected an object"),
    ],
)
def test_an_unusable_config_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, **change)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_settings_by_architecture(tmp_path):
    """Where transformers' classes read an entry that others ignore, or have one built in."""
    beta = {"rope_parameters": YARN}
    assert read(tmp_path, **MINISTRAL3, **beta).yarn.llama_4_scaling_beta == 0.1
    assert read(tmp_path, **beta).yarn.llama_4_scaling_beta == 0
    qwen = read(tmp_path, **QWEN2, sliding_window=4096)  # of Qwen2.5's files, which do not use it
    assert (qwen.sliding_window, qwen.qkv_bias, qwen.qk_norm) == (None, True, False)
    assert read(tmp_path, architectures=["Qwen3ForCausalLM"]).qk_norm
    sliding = ["sliding_attention"] * 3
    assert read(tmp_path, layer_types=sliding, sliding_window=4).sliding_window == 4
    late = {"max_window_layers": 28, "use_sliding_window": True, "sliding_window": 4}
    assert read(tmp_path, **QWEN2, **late).sliding_window is None  # three layers, all below 28
    default = {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"}
    shape = read(tmp_path, rope_parameters=default, max_position_embeddings=128)
    assert shape.yarn.original_max_position_embeddings == 128


@pytest.mark.parametrize("names", [5, ["lm_head.weight"], None])
def test_an_index_without_names_stores_no_head(names, tmp_path):
    """Its own refusal comes when the weights are opened."""
    index = tmp_path / "model.safetensors.index.json"
    text = {"model_type": "mistral", **BASE}
    for content, tied in (({"weight_map": names}, True), ({"weight_map": {HEAD: "a"}}, False)):
        index.write_text(json.dumps(content))
        shape = read(tmp_path, **TOWER, text_config=text, tie_word_embeddings=True)
        assert shape.tie_word_embeddings == tied


def test_a_missing_or_broken_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_shape(tmp_path)


def test_a_decoder_of_the_largest_sizes_can_be_counted(tmp_path):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    shape = read(tmp_path, **dict.fromkeys((*sizes, "num_key_value_heads"), 2**20))
    block = 4 * 2**60 + 3 * 2**40 + 2 * 2**20
    assert count_parameters(shape) == 3 * block + 2 * 2**40 + 2**20
