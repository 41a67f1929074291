"""Ctrl-C in a real process, at moments that an audit hook finds: one line, status 130, nothing left."""

import subprocess
import sys

import pytest

# Gets SIGINT at the given events of Python's audit hooks that name something.
RUN = """
import signal, sys, threading
events, word, *args = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)

def press(event, given):
    if event in events.split() and word in str(given[0]):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # seen before the event goes on

sys.addaudithook(press)
from jaxllm.cli import main
main(args)
"""


@pytest.mark.parametrize(
    "events, word",
    [
        ("import", "numpy"),  # it crashes where the error of Ctrl-C is raised in it
        pytest.param("import", "safetensors", marks=pytest.mark.slow),  # the command has begun
        pytest.param("os.mkdir", "small.tmp", marks=pytest.mark.slow),
        pytest.param("open", "manifest.json", marks=pytest.mark.slow),
        pytest.param("os.rename shutil.rmtree os.rmdir", "small.tmp", marks=pytest.mark.slow),  # and again
    ],
)
def test_ctrl_c_ends_in_one_line_and_leaves_nothing(events, word, tiny_checkpoint, tmp_path):
    args = ("convert", str(tiny_checkpoint), "new/small", "--json")
    done = subprocess.run(
        [sys.executable, "-c", RUN, events, word, *args],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jaxllm: interrupted\n")
    assert list(tmp_path.iterdir()) == []
