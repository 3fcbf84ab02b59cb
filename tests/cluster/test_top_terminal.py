"""`shoal top` as a user has it: the real command on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.config import parse_config
from cluster.http_client import ApiClient
from cluster.inline_server import InlineServer
from cluster.launcher import free_port
from cluster.plot_cli import plot_app
from cluster.top.history import History
from cluster.top.reading import read
from cluster.top.view import line
from tests.cluster.conftest import wait_ready
from tests.fakes import TIMEOUT_S
from tests.shoal_stub import ShoalStub, load_body, make_load, make_status

STATUS = make_status("experts-0", "attention-0")
V3 = make_load([[1] * 256 for _ in range(58)], first_layer=3)
ENTER, LEAVE, SHOW_CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"
HOME = b"\x1b[H"
ON_THIS_TERMINAL = """
import os
os.open(os.ttyname(0), os.O_RDWR)  # the session's first one: its Ctrl-C is our SIGINT
from cluster.__main__ import main
main()
"""
STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A pseudo-terminal with a command on it."""

    def __init__(self, *args: str, size: tuple[int, int] = (30, 100), **env: str) -> None:
        """size: (lines, columns)."""
        self._screen, self._line = pty.openpty()
        termios.tcsetwinsize(self._line, size)
        self.settings = self.now()
        self.output = b""
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_THIS_TERMINAL, *args],
            stdin=self._line,
            stdout=self._line,
            stderr=self._line,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **env},
        )

    def now(self) -> list[object]:
        """The terminal's settings: echo, line mode, special characters."""
        return termios.tcgetattr(self._line)

    def press(self, keys: bytes) -> None:
        os.write(self._screen, keys)

    def resize(self, lines: int, columns: int) -> None:
        termios.tcsetwinsize(self._line, (lines, columns))

    @property
    def text(self) -> str:
        """What the screen shows, or what was written if it is not taken over."""
        return STYLE.sub("", self.output.rpartition(HOME)[2].decode(errors="replace"))

    def wait(self, shows: Callable[[str], object]) -> str:
        """Until the screen shows it; fails the test after TIMEOUT_S."""
        deadline = time.monotonic() + TIMEOUT_S
        while not shows(self.text):
            assert time.monotonic() < deadline and self._read(), f"not shown: {self.text}"
        return self.text

    def wait_for(self, text: str) -> str:
        return self.wait(lambda shown: text in shown)

    def _read(self) -> bool:
        """Take in what is written within a second; False: nothing, ever again."""
        if not select.select([self._screen], [], [], 1.0)[0]:
            return self.process.poll() is None
        self.output += os.read(self._screen, 65536)
        return True

    def end(self) -> int:
        """The exit status, with all that was written in `output`."""
        deadline = time.monotonic() + TIMEOUT_S
        while self._read():
            assert time.monotonic() < deadline
        return self.process.wait(TIMEOUT_S)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._screen)
        os.close(self._line)


@pytest.fixture(scope="module")
def inline(checkpoint_dir: Callable[[str], Path]) -> Iterator[str]:
    """URL of a real inline server with a tiny V3."""
    port = free_port()
    model = str(checkpoint_dir("v3"))
    server = InlineServer(parse_config({"model": model, "listen": {"http_port": port}}))
    server.start()
    try:
        wait_ready(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        server.drain()
    finally:
        server.stop()


@contextmanager
def stub() -> Iterator[ShoalStub]:
    with ShoalStub({"/status": STATUS, "/v1/experts/load": load_body(V3)}) as server:
        yield server


@pytest.mark.parametrize(
    ("how", "code"), [(b"q", 0), (b"\x03", 130), (signal.SIGTERM, 130)], ids=["q", "Ctrl-C", "TERM"]
)
def test_it_leaves_the_terminal_as_it_was(
    inline: str, how: bytes | signal.Signals, code: int
) -> None:
    with Terminal("top", "--url", inline) as terminal:
        shown = terminal.wait(lambda text: "experts 2/2" in text and "q quit" in text)
        assert ": ready, epoch " in shown
        assert re.search(r"^ *\d+ [·▁-█]+ \d\.\d\d", shown, re.MULTILINE)
        assert terminal.now() != terminal.settings  # keys are read one by one, without echo
        if isinstance(how, bytes):
            terminal.press(how)
        else:
            terminal.process.send_signal(how)
        assert terminal.end() == code
        assert terminal.now() == terminal.settings
    assert terminal.output.count(ENTER) == terminal.output.count(LEAVE) == 1
    assert SHOW_CURSOR in terminal.output.rpartition(LEAVE)[0][-20:] + terminal.output[-20:]
    assert b"Traceback" not in terminal.output


def test_a_real_server_tells_all_that_is_shown(inline: str) -> None:
    """9 tokens: one first, eight times between two (fewer if some come together), one request."""
    client = ApiClient(inline)
    list(client.chat([{"role": "user", "content": "Hi"}], max_tokens=9, ignore_eos=True))
    command = f"latency --seconds 0 --json --url {inline}".split()
    deadline, counts, text = time.monotonic() + TIMEOUT_S, dict[str, int](), ""
    while not counts.get("e2e_s"):  # who asks may get the answer of half a second ago
        assert time.monotonic() < deadline
        asked = CliRunner().invoke(plot_app, command)
        histograms = json.loads(asked.stdout or '{"histograms": {}}')["histograms"]
        counts = {name: sum(found["counts"]) for name, found in histograms.items()}
    assert 1 <= counts.pop("itl_s") <= 8 and counts == {"ttft_s": 1, "e2e_s": 1}
    while " -" in text or not re.search(r"hottest \d+:\d+ .*/s +\d+% on \d", text):
        assert time.monotonic() < deadline, text
        list(client.chat([{"role": "user", "content": "Hi"}], max_tokens=9, ignore_eos=True))
        text = line(History(read(client)), [])


def test_it_says_that_the_server_is_away_and_goes_on_when_it_is_back() -> None:
    with stub() as server, Terminal("top", "--interval", "0.2", "--url", server.url) as terminal:
        terminal.wait_for("q quit")
        server.stop()
        assert "tiny: ready" in terminal.wait_for("trying again")
        server.start()
        shown = terminal.wait_for("the server is back after")
        assert "trying again" not in shown
        terminal.press(b"q")
        assert terminal.end() == 0


def test_keys_and_sizes_of_the_terminal_change_which_layers_are_shown() -> None:
    """58 layers, of which 30 lines have room for 10."""
    with stub() as server, Terminal("top", "--url", server.url) as terminal:
        terminal.wait_for("layers 3-12 of 3-60")
        terminal.press(b"\x1b[B\x1b[B")
        terminal.wait_for("layers 5-14 of 3-60")
        terminal.press(b"\x1b[6~")
        terminal.wait_for("layers 15-24 of 3-60")
        terminal.press(b"\x1b[F")
        terminal.wait_for("layers 51-60 of 3-60")
        terminal.resize(100, 100)
        terminal.wait(lambda text: "\n60 ▄" in text and "\n 3 ▄" in text)
        terminal.press(b"q")
        assert terminal.end() == 0


def test_no_color_has_no_colours() -> None:
    with stub() as server, Terminal("top", "--url", server.url, NO_COLOR="1") as terminal:
        terminal.wait_for("q quit")
        terminal.press(b"q")
        assert terminal.end() == 0
    assert not re.search(rb"\x1b\[[0-9;]*[34][0-9]m", terminal.output)
