"""Small tokenizers of Llama 2's kind, made on the spot: <unk>, <s>, </s>, 256 bytes, pieces."""

from pathlib import Path

import pytest

SENTENCES = ["the cat sat on the mat", "a dog ran to the cat", "on the mat sat a dog"]
PIECES = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581t", "\u2581th", "\u2581the", "\u2581c"]
MERGES = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("\u2581", "c")]


def hugging_face(folder: Path) -> Path:
    """tokenizer.json of 290 tokens; like Llama 2's, its own post-processor would add <s> too."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    vocabulary = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = n.Sequence([n.Prepend("\u2581"), n.Replace(" ", "\u2581")])
    made.decoder = d.Sequence(
        [d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def sentence_piece(folder: Path, exact: bool = False) -> Path:
    """tokenizer.model of 300 tokens. exact: lines and blanks are kept as they are."""
    kept = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    library = pytest.importorskip("sentencepiece")
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **kept if exact else {},
    )
    return folder / "tokenizer.model"
