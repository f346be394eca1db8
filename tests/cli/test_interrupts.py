"""Ctrl-C and SIGTERM, from before torch is imported: one line, and the exit code of the signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = {"SIGINT": 130, "SIGTERM": 143}
# Sends itself a signal as soon as a module is looked for: a moment that no clock hits.
HOOK = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{sent})
sys.meta_path.insert(0, Finder())
"""
SCRIPT = "import sys\nfrom elmkernels.cli.main import main\nsys.exit(main())\n"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends a signal")


def run(tmp_path: Path, command: list[str], module: str, sent: str, ignore: bool = False):
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(module=module, sent=sent))
    handler = signal.SIG_IGN if ignore else signal.SIG_DFL
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(getattr(signal, sent), handler),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("sent", SIGNALS)
@pytest.mark.parametrize("module", ["torch", "torch.nn", "elmkernels.ops", "elmkernels.cli.main"])
def test_a_signal_while_modules_are_loaded(tmp_path, module, sent):
    done = run(tmp_path, ["-m", "elmkernels", "info"], module, sent)
    assert (done.returncode, done.stdout) == (SIGNALS[sent], "")
    assert done.stderr == "elmkernels: interrupted\n"


@pytest.mark.parametrize("sent", SIGNALS)
@pytest.mark.parametrize("module", ["torch", "elmkernels.cli.options"])
def test_a_signal_while_the_installed_script_loads(tmp_path, module, sent):
    script = tmp_path / "bin" / "elmkernels"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = run(tmp_path, [str(script), "info"], module, sent)
    assert (done.returncode, done.stdout) == (SIGNALS[sent], "")
    assert done.stderr == "elmkernels: interrupted\n"


@pytest.mark.parametrize("sent", SIGNALS)
def test_a_signal_while_a_command_loads_more(tmp_path, sent):
    """`train` imports its room late, inside of `main`."""
    done = run(tmp_path, ["-m", "elmkernels", "train", "tiny"], "elmkernels.training", sent)
    assert (done.returncode, done.stdout) == (SIGNALS[sent], "")
    assert done.stderr == "elmkernels: interrupted\n"
    assert not (tmp_path / "runs").exists()


def test_what_is_ignored_stays_ignored(tmp_path):
    """A job of `nohup`, or in the background of a script."""
    done = run(tmp_path, ["-m", "elmkernels", "--version"], "torch", "SIGINT", ignore=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [["-c", "import elmkernels"], ["-m", "program"], ["program.py", "-m", "elmkernels"]],
    ids=" ".join,
)
def test_a_program_that_imports_the_package_keeps_its_own_answer(tmp_path, command):
    (tmp_path / "program.py").write_text("import elmkernels\n")
    (tmp_path / "torch.py").write_text("")  # its own answer comes before anything is used
    done = run(tmp_path, command, "torch", "SIGINT")
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
