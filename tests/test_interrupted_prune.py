"""`python -m learning prune`, interrupted, leaves nothing."""

from __future__ import annotations

import signal

import pytest

from learning.__main__ import main
from learning.commands import prune as prune_command
from learning.commands import pruned_output

from .test_learning_cli import PRUNE, files
from .tiny import save_tiny


@pytest.fixture
def heard():
    """A shell starts what it runs in the background deaf to SIGINT."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.parametrize(("module", "moment"), [(prune_command, "prune"), (pruned_output, "save_compressed")])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path, capsys, monkeypatch, module, moment, number, heard):
    base = save_tiny(tmp_path / "base")
    original, before = getattr(module, moment), signal.getsignal(number)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        signal.raise_signal(number)

    monkeypatch.setattr(module, moment, interrupted)
    assert main(["prune", str(base), *PRUNE, "-o", str(tmp_path / "sub" / "out")]) == 130
    assert files(tmp_path) == {"base"}
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) == before
