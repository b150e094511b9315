"""A model folder's tokenizer, from tokenizer.json or from sentencepiece's tokenizer.model."""

from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from notus.errors import UserError


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, from an unchanged tokenizer.json or from tokenizer.model.

    vocab_size: the model's, if the tokenizer is to be checked against it.

    Not AutoTokenizer: for Llama-type tokenizers transformers 5 rebuilds the normaliser, and from a
    tokenizer.model also the merges, and then splits runs of spaces differently than in training.
    Raises UserError when the folder has neither file, when it names no end-of-sequence token, and
    when the tokenizer has more tokens than the model.
    """
    # Texts are cut to the configuration's lengths; the files may hold any value for it.
    options = {"model_max_length": int(VERY_LARGE_INTEGER)}
    try:
        if (folder / "tokenizer.json").is_file():
            Tokenizer.from_file(str(folder / "tokenizer.json"))  # its message says where and what
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        elif (folder / "tokenizer.model").is_file():
            backend = sentencepiece_backend(folder / "tokenizer.model")
            options["tokenizer_object"] = backend
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        else:
            raise UserError(f"{folder}: no tokenizer.json or tokenizer.model; expected a tokenizer")
    except UserError:
        raise
    except Exception as error:  # whatever the libraries meet in damaged files
        raise UserError(f"{folder}: the tokenizer cannot be read ({error})") from None
    if not tokenizer.eos_token or tokenizer.eos_token_id is None:
        raise UserError(f"{folder}/tokenizer_config.json: no eos_token; expected one")
    for name, token in tokenizer.special_tokens_map.items():
        if token == "":
            raise UserError(f"{folder}: the tokenizer's {name} is empty; expected text or null")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but config.json's vocab_size is "
            f"{vocab_size}; expected at least as many"
        )
    return tokenizer


def sentencepiece_backend(path: Path) -> Tokenizer:
    """A fast tokenizer, with offsets, equal to the sentencepiece BPE model at `path`.

    For models with Llama's settings: text not normalised, a space put in front, byte fallback.
    Raises UserError when the file is not a sentencepiece model.
    """
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not a sentencepiece model ({error})") from None
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    # sentencepiece joins the adjacent pair whose joined piece has the best score, so the merges are
    # all splits of every piece into two known pieces, best piece first.
    merges = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue  # no text is ever joined into one of these
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [split for split in splits if split[0] in ids and split[1] in ids]
        known.sort(key=lambda split: (ids[split[0]], ids[split[1]]))
        merges += [(-model.get_score(i), split) for split in known]
    merges.sort(key=lambda merge: merge[0])  # stable: equal scores keep the pieces' order
    bpe = models.BPE(
        ids,
        [split for _, split in merges],
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [model.unk_id(), model.bos_id(), model.eos_id()]
    tokenizer.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in special])
    bos = pieces[model.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, model.bos_id())]
    )
    return tokenizer
