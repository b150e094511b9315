"""A small tokenizer as Mistral's, and texts that are hard to tokenize."""

import json
import re
from pathlib import Path

import sentencepiece
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CORPUS = """The river runs through the old town and over the stones to the sea.
What is the capital of the country? The capital is the largest city of the country.
def f(x):
    return x + 1 if x else  f(x - 1)    # two  spaces, then   three
Hello there! Hi, how are you? I am well, thank you, and you are too.
A big bus above all, a bird and a bee.
12345 + 67.89 = ? The answer is 4. user system assistant <|user|> <|assistant|>
""".splitlines()

# The published one, with its line ends: transformers trims them after blocks.
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)
UNK, BOS, EOS = 0, 1, 2

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
pieces = st.sampled_from(
    [*"abeht .?!1\n\té日🤗", "the", " the", "  ", "    ", " river", "Hello", "<|user|>", "</s"]
)
odd_pieces = pieces | st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "▁", "▁▁"])
texts = st.lists(pieces, min_size=1, max_size=12).map("".join)
odd_texts = st.lists(odd_pieces, max_size=12).map("".join)


def write_tokenizer(folder: Path) -> Path:
    """tokenizer.model with Llama's settings, and Zephyr's template, in `folder`."""
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=file,
            model_type="bpe",
            vocab_size=420,
            hard_vocab_limit=False,
            character_coverage=1.0,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            minloglevel=2,
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": ZEPHYR, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def sentencepiece_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def by_sentencepiece(spm, text):
    """The original algorithm: sentencepiece on each stretch between special tokens."""
    ids = []
    for part in re.split("(<unk>|<s>|</s>)", text):
        special = {"<unk>": UNK, "<s>": BOS, "</s>": EOS}.get(part)
        ids += spm.encode(part) if special is None else [special]
    return ids
