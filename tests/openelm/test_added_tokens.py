"""Tokens that files beside a SentencePiece model add: in text, in ids, in what is saved."""

import json
from pathlib import Path

import pytest
from helpers.tokenizers import sentence_piece

from elmkernels.openelm.tokenizer import TextStream, Tokenizer
from elmkernels.training.data import tokenizers

FILES = ["added_tokens.json", "tokenizer.json", "tokenizer_config.json"]


def add(folder: Path, how: str, entries: dict[int, dict]) -> None:
    """Write tokens into a file, in one of the ways there are."""
    if how == "added_tokens.json":
        values = {entry["content"]: i for i, entry in entries.items()}
        special = [entry["content"] for entry in entries.values() if entry.get("special")]
        said = json.dumps({"additional_special_tokens": special})
        (folder / "special_tokens_map.json").write_text(said)
    elif how == "tokenizer.json":
        values = {"added_tokens": [{"id": i, **entry} for i, entry in entries.items()]}
    else:
        values = {"added_tokens_decoder": {str(i): entry for i, entry in entries.items()}}
    (folder / how).write_text(json.dumps(values))


@pytest.fixture
def made(tmp_path):
    """A tokenizer.model that keeps blanks, and how many tokens are its own."""
    file = sentence_piece(tmp_path, exact=True)
    return file, Tokenizer(file).vocab_size


@pytest.mark.parametrize("how", FILES)
def test_text_with_added_tokens_goes_and_comes(made, how):
    file, n = made
    bare = Tokenizer(file)
    end = {"content": "<|end|>", "special": True}
    entries = {n: {"content": "<tool>"}, n + 3: {"content": "<tool> é"}, n + 1: end}
    add(file.parent, how, entries)
    tokenizer = Tokenizer(file)
    assert tokenizer.vocab_size == n + 4
    assert tokenizer.id_of(["<|end|>"]) == n + 1 and tokenizer.id_of(["<tool> é"]) == n + 3
    assert tokenizer.encode("the cat") == bare.encode("the cat")
    cat, dog = bare.encode("the cat")[1:], bare.encode("a dog")[1:]
    for text, ids in {
        "the cat<tool>a dog": [*cat, n, *dog],
        "<tool> éthe cat": [n + 3, *cat],  # the longest that begins there
        "the cat<tool><tool>": [*cat, n, n],
        "<tool>": [n],
        "": [],
    }.items():
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode([1, *ids]) == text
    texts = ["the cat<tool> a dog\n", "<tool>", "", "  <tool>  <tool> é 猫<tool>猫"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert tokenizer.encode("the cat<|end|>") == [1, *cat, n + 1]
    assert tokenizer.decode([1, *cat, n + 1, n + 2]) == "the cat"  # special, and unknown


@pytest.mark.parametrize("cut", range(8))
def test_added_tokens_come_in_a_stream(made, cut):
    file, n = made
    add(file.parent, FILES[0], {n: {"content": "<tool>"}, n + 1: {"content": "\n\n"}})
    tokenizer = Tokenizer(file)
    text = "the<tool> 猫<tool>\n\na dog 猫\n\n"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, ids[:cut])
    pieces = [stream.add(i) for i in ids[cut:]] + [stream.end()]
    assert tokenizer.decode(ids[:cut]).rstrip("\ufffd") + "".join(pieces) == text
    assert "".join(pieces) == tokenizer.continuation(ids[:cut], ids[cut:])


@pytest.mark.parametrize("how", FILES[1:])
def test_blanks_that_a_token_takes(made, how):
    file, n = made
    entries = {
        n: {"content": "<l>", "lstrip": True},
        n + 1: {"content": "<r>", "rstrip": True, "lstrip": False},
    }
    add(file.parent, how, entries)
    tokenizer = Tokenizer(file)
    for text in ("the <l>a", "the<l>a <l>", "the<r> a", "the<r> <r>a", "<r>  <l>a"):
        exact = text.replace(" <l>", "<l>").replace("<r> ", "<r>").replace("<r> ", "<r>")
        assert tokenizer.decode(tokenizer.encode(text)) == exact


def test_a_text_of_the_model_s_own_tokens(made):
    """What a file says of tokens that the model has: they are matched, as in tokenizer.json."""
    file, n = made
    end = {"content": "</s>", "special": True}
    add(file.parent, "tokenizer_config.json", {2: end, 1: {"content": "<s>", "special": True}})
    tokenizer = Tokenizer(file)
    assert tokenizer.encode("<s>the</s>") == [*tokenizer.encode("the"), 2]
    assert tokenizer.vocab_size == n


@pytest.mark.parametrize(
    ("how", "values"),
    [
        ("added_tokens.json", {"x": "1"}),
        ("added_tokens.json", {"x": 2**31}),
        ("added_tokens.json", {"x": True}),
        ("added_tokens.json", {"": 300}),
        ("added_tokens.json", {"\ud83d": 300}),
        ("tokenizer.json", {"added_tokens": [{"id": 300}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": 5}}}),
    ],
)
def test_added_tokens_that_are_none(made, how, values):
    file, _ = made
    (file.parent / how).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{how} must give added tokens a text and an id"):
        Tokenizer(file)


@pytest.mark.parametrize("listed", [5, "x", {"a": 1}, True, 1.5])
def test_a_list_that_is_none(made, listed):
    file, _ = made
    (file.parent / "tokenizer.json").write_text(json.dumps({"added_tokens": listed}))
    with pytest.raises(ValueError, match="tokenizer.json: added_tokens must be a list"):
        Tokenizer(file)


@pytest.mark.parametrize("how", ["added_tokens.json", "special_tokens_map.json"])
@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"[" * 100000])
def test_files_beside_that_are_none(made, how, data):
    file, _ = made
    (file.parent / how).write_bytes(data)
    with pytest.raises(ValueError, match=how):
        Tokenizer(file)


@pytest.mark.parametrize("how", FILES)
def test_added_tokens_go_on_to_a_trained_checkpoint(made, tmp_path, how):
    file, n = made
    bare = tokenizers.load(str(file)).identity
    add(file.parent, how, {n: {"content": "<tool>"}, n + 1: {"content": "<end>", "special": True}})
    loaded = tokenizers.load(str(file))
    assert loaded.vocab_size == n + 2 and loaded.identity != bare
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    tokenizers.save(out, str(file))
    text = "the<tool>cat<end>"
    assert Tokenizer(out / file.name).encode(text) == Tokenizer(file).encode(text)
    assert Tokenizer(out / file.name).decode([n + 1, n]) == "<tool>"
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"
    assert tokenizers.load(str(out / file.name)).identity == loaded.identity
