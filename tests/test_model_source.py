"""What a name that a user gives for a model stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from patch_compiler.bench.variants import load, parameter_count
from patch_compiler.model_source import is_path, model_source


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (
        ("dense/config.json", "{}"),
        ("packed/config.json", '{"quantization_config": {"quant_method": "patch"}}'),
        ("other/config.json", '{"quantization_config": {"quant_method": "gptq"}}'),
        ("one/a.gguf", ""),
        ("two/a.gguf", ""),
        ("two/b.gguf", ""),
        ("both/a.gguf", ""),
        ("both/config.json", "{}"),
        ("none/readme.txt", ""),
        ("adapter/adapter_config.json", "{}"),
        ("file.txt", ""),
        ("org/name/config.json", "{}"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "kind", "name"),
    [
        ("dense", "directory", "dense"),
        ("./dense/", "directory", "dense"),
        ("~/dense", "directory", "dense"),
        ("other", "directory", "other"),
        ("both", "directory", "both"),
        ("packed", "packed", "packed"),
        ("one", "gguf", "a.gguf"),
        ("two/b.gguf", "gguf", "b.gguf"),
        ("org/name", "directory", "name"),  # what lies here goes before what the hub has
        ("org/another", "hub", "org/another"),
        ("gpt2", "hub", "gpt2"),
    ],
)
def test_names(here: Path, given: str, kind: str, name: str) -> None:
    found = model_source(given)
    assert (found.kind, found.name) == (kind, name)
    assert model_source(Path(given)).kind == kind
    assert found.location == given if kind == "hub" else os.path.exists(found.location)
    assert is_path(given) == (kind != "hub")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none", "model directory 'none' holds neither config.json nor a .gguf file"),
        ("adapter", "model directory 'adapter' holds an adapter of PEFT, not a model: merge it into its base model"),
        ("two", "holds 2 .gguf files; name one of a.gguf, b.gguf"),
        ("file.txt", "model 'file.txt': no such directory or .gguf file"),
        ("./gone", "no such directory or .gguf file"),
        ("a/b/c", "no such directory or .gguf file"),
        ("/gone.gguf", "no such directory or .gguf file"),
    ],
)
def test_paths_that_hold_no_model(here: Path, given: str, message: str) -> None:
    for read in (model_source, parameter_count, lambda name: load(name, torch.device("cpu"), torch.float32)):
        with pytest.raises(ValueError, match="model") as caught:
            read(given)
        assert message in str(caught.value)


def test_the_whole_model_benchmark_says_what_to_do_with_gguf(here: Path) -> None:
    with pytest.raises(ValueError, match="GGUF is not read here; `python -m learning export` makes a directory of it"):
        parameter_count("one")
