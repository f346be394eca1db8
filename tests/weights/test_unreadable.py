"""Files that are somebody else's."""

import errno
import os
from pathlib import Path

import pytest
from helpers.checkpoints import CONFIG

from elmkernels import OpenELM
from elmkernels.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    OpenELM(CONFIG, seed=1).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.pt", "config.json", "tokenizer.json", "tokenizer.model"]
)
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch, capsys, name):
    file = folder / name
    if not file.exists():
        file.write_bytes(b"any")
    allowed = Path.open

    def opened(self: Path, *args, **kwargs):
        if self == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return allowed(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    source = file if name == "model.pt" else folder
    if name.startswith("tokenizer"):
        pytest.importorskip({".json": "tokenizers", ".model": "sentencepiece"}[file.suffix])
    else:
        config = CONFIG if name == "model.pt" else None
        with pytest.raises(PermissionError, match="Permission denied"):
            OpenELM.from_pretrained(source, config=config)
    argv = ["generate", "--checkpoint", str(source), "--ids", "1"]
    if name == "model.pt":
        argv += ["--config", "OpenELM-270M"]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line and line.endswith("Permission denied")
    assert "Errno" not in line and "complete" not in line
