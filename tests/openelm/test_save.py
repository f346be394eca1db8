"""Saves that fail or are killed at any step: the folder is one whole checkpoint or the other."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.checkpoints import CONFIG, assert_same

from elmkernels.openelm import OpenELM, OpenELMConfig, pack
from elmkernels.weights import storage

OTHER = OpenELMConfig.from_hf_dict(CONFIG.to_hf_dict() | {"norm_eps": 1e-5, "rope_max_length": 32})


@pytest.mark.parametrize("old_shards", [None, 60_000], ids=["over one", "over shards"])
@pytest.mark.parametrize(
    ("new_shards", "packed12"),
    [(None, False), (60_000, False), (None, True)],
    ids=["one", "shards", "packed12"],
)
def test_a_save_that_fails_anywhere_leaves_one_whole_checkpoint(
    tmp_path, monkeypatch, old_shards, new_shards, packed12
):
    """Fail at the nth step that touches the disk, for every n: no mixture is ever loaded."""
    old, new = OpenELM(CONFIG, seed=1), OpenELM(OTHER, seed=2)
    if packed12:
        pack(new.bfloat16())
    steps = {
        (storage, "write_safetensors"): storage.write_safetensors,
        (storage, "write_json"): storage.write_json,
        (storage.os, "replace"): os.replace,
        (storage.Path, "unlink"): Path.unlink,
        (storage.os, "fsync"): os.fsync,
    }
    outcomes = []
    for last in range(1000):
        folder = tmp_path / str(last)
        old.save_pretrained(folder, max_shard_bytes=old_shards)
        counter = iter(range(last))

        def counted(step, counter=counter):
            def call(*args, **kwargs):
                if next(counter, None) is None:
                    raise KeyboardInterrupt
                return step(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for (owner, name), step in steps.items():
                patch.setattr(owner, name, counted(step))
            try:
                new.save_pretrained(folder, max_shard_bytes=new_shards)
                finished = True
            except KeyboardInterrupt:
                finished = False
        loaded = OpenELM.from_pretrained(folder)
        outcomes.append(loaded.config == OTHER)
        assert_same(loaded, new if outcomes[-1] else old)
        if not outcomes[-1]:
            new.save_pretrained(folder, max_shard_bytes=new_shards)  # and a second try works
            assert_same(OpenELM.from_pretrained(folder), new)
            assert not [name for name in os.listdir(folder) if name.startswith(".")]
        shutil.rmtree(folder)
        if finished:
            break
    assert finished and last > 8
    assert outcomes == sorted(outcomes) and not outcomes[0] and outcomes[-1]


KILLED = """
import os, signal, sys
from elmkernels.openelm import OpenELM, OpenELMConfig
from elmkernels.weights import storage

folder, config, where = sys.argv[1], OpenELMConfig.from_hf_dict(eval(sys.argv[2])), sys.argv[3]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_written(file, **what):
    whole(file, **what)
    os.truncate(file, os.path.getsize(file) // 2)
    die()

def second_replace(source, target, done=[]):
    done.append(replace(source, target))
    if len(done) == 2:
        die()

whole, replace = storage.write_safetensors, os.replace
if where == "weights":
    storage.write_safetensors = half_written
else:
    os.replace = second_replace
OpenELM(config, seed=2).save_pretrained(folder)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("where", ["weights", "renames"])
def test_a_killed_save(folder, where):
    """A process that dies half way through the weights, or between the two renames."""
    arguments = [sys.executable, "-c", KILLED, str(folder), repr(OTHER.to_hf_dict()), where]
    root = Path(storage.__file__).parents[2]
    result = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    expected = OpenELM(OTHER, seed=2) if where == "renames" else OpenELM(CONFIG, seed=1)
    assert any(name.startswith(".") for name in os.listdir(folder)), "nothing was interrupted"
    assert_same(OpenELM.from_pretrained(folder), expected)
    OpenELM(CONFIG, seed=3).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same(OpenELM.from_pretrained(folder), OpenELM(CONFIG, seed=3))
