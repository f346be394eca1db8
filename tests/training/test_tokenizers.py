"""The byte tokenizer and borrowed ones: ids, the ends of documents, and what is saved."""

import json
from types import SimpleNamespace

import pytest
from helpers.checkpoints import CONFIG
from helpers.tokenizers import hugging_face, sentence_piece

from elmkernels.openelm import OpenELM
from elmkernels.openelm.checkpoint import read_config
from elmkernels.openelm.config import OpenELMConfig
from elmkernels.openelm.tokenizer import Tokenizer
from elmkernels.training import run
from elmkernels.training.data import tokenizers

TEXT = "the cat sät on 猫\n\t\U0001f408 \x00"


def test_bytes_are_their_own_ids():
    made = tokenizers.load("bytes")
    assert (made.vocab_size, made.eos, made.bos) == (257, 256, None)
    assert [ids.tolist() for ids in made.encode([TEXT.encode(), b"", b"\xff"])] == [
        list(TEXT.encode()),
        [],
        [255],
    ]


def test_the_project_reads_the_byte_tokenizer_that_is_saved(tmp_path):
    pytest.importorskip("tokenizers")
    assert tokenizers.save(tmp_path) == {"bos_token_id": None, "eos_token_id": 256}
    read = Tokenizer(tmp_path / "tokenizer.json", bos=None)
    assert read.vocab_size == 257
    assert read.encode(TEXT) == list(TEXT.encode())
    assert read.decode([*TEXT.encode(), 256]) == TEXT
    # Every byte: those that are no UTF-8 by themselves as well.
    pairs = "".join(map(chr, range(0x20, 0x800)))
    assert read.encode(pairs) == list(pairs.encode())
    assert read.decode([65, 0xFF, 66]) == "A\ufffdB"
    again = tokenizers.load(str(tmp_path))
    assert again.eos == 256 and again.bos is None and again.vocab_size == 257
    assert again.encode([TEXT.encode()])[0].tolist() == list(TEXT.encode())


@pytest.mark.parametrize("make", [hugging_face, sentence_piece])
def test_a_borrowed_tokenizer(tmp_path, make):
    path = make(tmp_path)
    made = tokenizers.load(str(path))
    assert (made.bos, made.eos) == (1, 2)
    read = Tokenizer(path, bos=None)
    texts = ["the cat", "", TEXT.replace("\x00", ""), "a dog"]
    encoded = made.encode([text.encode() for text in texts])
    assert [ids.tolist() for ids in encoded] == [read.encode(text) for text in texts]
    assert made.encode([]) == []
    assert max(max(ids, default=0) for ids in encoded) < made.vocab_size == read.vocab_size
    assert made.encode([b"a\xff"])[0].tolist() == read.encode("a\ufffd")
    assert Tokenizer(path).encode_batch(texts) == [Tokenizer(path).encode(text) for text in texts]


@pytest.mark.parametrize("make", [hugging_face, sentence_piece])
def test_a_borrowed_tokenizer_is_saved_as_its_file(tmp_path, make):
    path = make(tmp_path)
    (tmp_path / "out").mkdir()
    said = tokenizers.save(tmp_path / "out", str(path))
    assert said == {"bos_token_id": 1, "eos_token_id": 2}
    saved = tmp_path / "out" / path.name
    assert saved.read_bytes() == path.read_bytes()
    # Into its own folder as well; and the same file elsewhere is the same tokenizer.
    tokenizers.save(tmp_path / "out", str(tmp_path / "out"))
    assert saved.read_bytes() == path.read_bytes()
    assert tokenizers.load(str(saved)).identity == tokenizers.load(str(path)).identity


def test_a_checkpoint_beside_it_says_where_documents_begin_and_end(tmp_path):
    config = OpenELMConfig(num_transformer_layers=1, model_dim=32, head_dim=16, vocab_size=300)
    OpenELM(config).save_pretrained(tmp_path)
    hugging_face(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for bos, eos, wanted in [(None, 7, (None, 7)), (1, [5, 6], (1, 5))]:
        values |= {"bos_token_id": bos, "eos_token_id": eos}
        (tmp_path / "config.json").write_text(json.dumps(values))
        made = tokenizers.load(str(tmp_path))
        assert (made.bos, made.eos) == wanted
    assert tokenizers.load(str(tmp_path), eos=9).eos == 9


def test_the_identity_changes_with_the_ids(tmp_path):
    path = hugging_face(tmp_path)
    first = tokenizers.load(str(path)).identity
    assert tokenizers.load(str(path), eos=9).identity != first
    path.write_text(path.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    assert tokenizers.load(str(path)).identity != first


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer must be a file or a folder"):
        tokenizers.load(str(tmp_path))
    with pytest.raises(ValueError, match="data.eos must be null or 256 with the tokenizer bytes"):
        tokenizers.load("bytes", eos=2)
    path = hugging_face(tmp_path)
    with pytest.raises(ValueError, match=r"data.eos must be in \[0, 290\)"):
        tokenizers.load(str(path), eos=290)
    path.write_text(path.read_text().replace("</s>", "<end>"))
    with pytest.raises(ValueError, match="data.eos must be given: .* has none of </s>"):
        tokenizers.load(str(path))
    assert tokenizers.load(str(path), eos=2).eos == 2


@pytest.fixture
def initial(tmp_path):
    """A checkpoint that says more than its shape, with a tokenizer of its own."""
    folder = tmp_path / "initial"
    config = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"vocab_size": 300})
    OpenELM(config, seed=1).save_pretrained(folder)
    hugging_face(folder)
    file = folder / "config.json"
    said = {"eos_token_id": [77, 9], "bos_token_id": 1, "pad_token_id": 0, "of_somebody": [1]}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    (folder / "generation_config.json").write_text('{"eos_token_id": [77, 9], "top_p": 0.9}')
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


def trained(initial, tokenizer, eos=None):
    """The model that a run writes which began with a checkpoint."""
    config, out = read_config(initial), initial.with_name("final")
    out.mkdir()
    weights = OpenELM(config, seed=2).state_dict()
    settings = SimpleNamespace(tokenizer=str(tokenizer), eos=eos)
    run._write_model(config, settings, weights, out)
    return out


def test_a_trained_model_says_what_it_began_with(initial):
    out = trained(initial, initial)
    for name in ("config.json", "generation_config.json"):
        values, theirs = (json.loads((f / name).read_text()) for f in (out, initial))
        assert values == theirs
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (initial / name).read_bytes()
    again = out.with_name("again")
    OpenELM.from_pretrained(out).save_pretrained(again)
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_a_model_trained_on_other_tokens_says_those(initial, tmp_path, tokenizer):
    other = tokenizer
    if tokenizer == "sentencepiece":
        (tmp_path / "other").mkdir()
        other = sentence_piece(tmp_path / "other")
    out = trained(initial, other)
    values = json.loads((out / "config.json").read_text())
    ids = {"bos_token_id": None, "eos_token_id": 256}
    if tokenizer == "sentencepiece":
        ids = {"bos_token_id": 1, "eos_token_id": 2}
    assert {name: values[name] for name in ids} == ids
    assert (values["pad_token_id"], values["of_somebody"]) == (0, [1])
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": ids["eos_token_id"], "top_p": 0.9}
    assert not (out / "special_tokens_map.json").exists()
    kept = OpenELM.from_pretrained(out).config
    assert kept.eos_token_ids == (ids["eos_token_id"],)
    assert Tokenizer.from_pretrained(out).bos == ids["bos_token_id"]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["its own", "another folder's"])
def test_added_tokens_of_the_data_go_with_the_trained_model(initial, tmp_path, elsewhere):
    (initial / "tokenizer.json").unlink()
    file = sentence_piece(initial, exact=True)
    (initial / "added_tokens.json").write_text('{"<tool>": 297}')
    theirs = initial
    if elsewhere:
        theirs = tmp_path / "data"
        theirs.mkdir()
        (theirs / file.name).write_bytes(file.read_bytes())
        (theirs / "added_tokens.json").write_text('{"<tool>": 298, "<call>": 299}')
    out = trained(initial, theirs / file.name, 2)
    text = "the<tool>cat<call>"
    ids = Tokenizer(theirs / file.name).encode(text)
    assert Tokenizer.from_pretrained(out).encode(text) == ids and 297 + elsewhere in ids
    kept = not elsewhere
    assert (out / "added_tokens.json").is_file() == kept
