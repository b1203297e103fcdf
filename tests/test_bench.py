"""The end-to-end benchmark: its decoder says what generate says, its maps are as sparse as asked, its numbers add up."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters

from patch_compiler import HardMask, PatchLinear, apply_masks, convert, named_linears, save_compressed
from patch_compiler.bench import __main__ as command
from patch_compiler.bench import first_call
from patch_compiler.bench import random_llama as sizes
from patch_compiler.bench.decoder import Function, GreedyDecoder
from patch_compiler.bench.page import page
from patch_compiler.bench.published_maps import published_maps
from patch_compiler.bench.random_llama import Size, random_llama
from patch_compiler.bench.rounds import Runs, Workload, measure
from patch_compiler.bench.variants import Variant, load, parameter_count, step_bytes, unpack, variants, weight_bytes

from .strategies import random_hard_mask, relative_error

TINY = Size(128, 320, 2, 4, 2, 300)


def tiny() -> nn.Module:
    return random_llama(TINY, "cpu", torch.float32)


def masked(model: nn.Module) -> nn.Module:
    masks = {n: random_hard_mask(tuple(m.weight.shape), 32) for n, m in named_linears(model).items() if n != "lm_head"}
    apply_masks(model, masks)
    return model


def by_generate(model: nn.Module, prompt: torch.Tensor, new: int) -> torch.Tensor:
    model.generation_config.eos_token_id = None  # min_new_tokens would forbid that token, which the decoder may well choose
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize("backend", [None, "eager", "patch"])
def test_the_decoder_says_what_generate_says(backend: str | None) -> None:
    model, prompt = masked(tiny()), torch.randint(300, (3, 7))
    wanted = by_generate(model, prompt, 9)
    if backend == "patch":
        convert(model)
    compile_ = None if backend is None else lambda f: torch.compile(f, backend=backend, fullgraph=True, dynamic=False)
    decoder = GreedyDecoder(model, 3, 16, compile_)
    for _ in range(2):  # a second prompt finds an empty cache
        assert torch.equal(decoder.generate(prompt, 9), wanted)


def test_many_decoders_do_not_meet_a_limit() -> None:
    model, prompt = tiny(), torch.randint(300, (1, 4))
    compile_ = lambda f: torch.compile(f, backend="eager", fullgraph=True, dynamic=False)  # noqa: E731
    with torch._dynamo.config.patch(recompile_limit=2):  # a prompt and a token each
        found = [GreedyDecoder(model, 1, 8, compile_).generate(prompt, 3) for _ in range(3)]
    assert all(torch.equal(f, found[0]) for f in found)


@settings(max_examples=40, deadline=None)
@given(sparsity=st.floats(0, 0.5), blocks=st.integers(1, 4), tile=st.sampled_from([16, 32, (16, 64)]), seed=st.integers(0, 99))
def test_published_maps_are_as_sparse_as_asked(sparsity: float, blocks: int, tile: int | tuple[int, int], seed: int) -> None:
    tile = (tile, tile) if isinstance(tile, int) else tile
    one = {"self_attn.q_proj": (72, 72), "self_attn.k_proj": (24, 72), "mlp.gate_proj": (200, 72), "mlp.down_proj": (72, 200)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in one.items()}
    maps = published_maps(shapes, sparsity, tile, seed)
    assert {name: m.shape for name, m in maps.items()} == shapes
    zeros, weights = (sum(getattr(m, what) for m in maps.values()) for what in ("zeros", "weights"))
    assert abs(zeros - sparsity * weights) <= tile[0] * tile[1] / 2
    if sparsity in (0, 0.5):
        assert zeros == sparsity * weights


def test_published_maps_leave_keys_dense_and_feed_forward_sparse() -> None:
    one = {"self_attn.q_proj": (512, 512), "self_attn.k_proj": (512, 512), "mlp.up_proj": (1024, 512)}
    shapes = {f"model.layers.{i}.{name}": shape for i in range(8) for name, shape in one.items()}
    maps = published_maps(shapes, 0.35, (32, 32))

    def mean(*words: str) -> float:
        found = [m.sparsity for name, m in maps.items() if all(w in name for w in words)]
        return sum(found) / len(found)

    assert mean("k_proj") < 0.05 < mean("q_proj") < mean("up_proj")
    assert mean("layers.0.", "q_proj") < mean("layers.4.", "q_proj") > mean("layers.7.", "q_proj")
    with pytest.raises(ValueError, match=r"0 to 0\.5"):
        published_maps(shapes, 0.6)


def test_unpacked_is_the_masked_model_and_shares_the_rest() -> None:
    model = masked(tiny())
    wanted = copy.deepcopy(model)
    convert(model)
    dense = unpack(model)
    assert not any(isinstance(m, PatchLinear) for m in dense.modules())
    assert dense.model.embed_tokens.weight is model.model.embed_tokens.weight
    ids = torch.randint(300, (2, 5))
    assert torch.equal(dense(ids).logits, wanted(ids).logits)
    assert any(isinstance(m, PatchLinear) for m in model.modules())


def test_a_shared_layer_is_unpacked_wherever_it_stands() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    model.append(model[0])
    wanted = copy.deepcopy(model)
    mask = random_hard_mask((32, 32), 16)
    apply_masks(wanted, {"0": mask})
    dense, x = unpack(convert(model, {"0": mask})), torch.randn(3, 32)
    assert dense[0] is dense[2]
    assert torch.equal(dense(x), wanted(x))


def test_what_is_compared() -> None:
    made = variants(tiny(), [0.25, 0.5], ["eager", "inductor"])
    assert [v.name for v in made[:2]] == ["dense, eager", "dense, inductor"]
    assert made[0].model is made[1].model
    assert made[3].name == "patch 50 %"
    assert made[0].weight_bytes > made[2].weight_bytes > made[3].weight_bytes
    packed = variants(convert(masked(tiny())), [0.25], ["eager"])
    assert len(packed) == 2
    assert packed[1].name.startswith("patch ")
    assert packed[0].weight_bytes == made[0].weight_bytes


def test_a_compressed_directory_is_compared_as_it_is(tmp_path: Path) -> None:
    model = convert(masked(tiny()))
    save_compressed(model, tmp_path / "packed")
    loaded = load(str(tmp_path / "packed"), torch.device("cpu"), torch.float32)
    dense, packed = variants(loaded, [], ["eager"])
    ids = torch.randint(300, (2, 5))
    assert relative_error(dense.model(ids).logits, model(ids).logits) < 1e-5
    assert torch.equal(packed.model(ids).logits, model(ids).logits)


def test_shared_memory_counts_once() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=50,
            tie_word_embeddings=True,
        )
    )
    own = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert weight_bytes(model) == own


def test_rounds_time_everybody() -> None:
    made = variants(tiny(), [0.5], ["eager"])
    made[1] = type(made[1])(made[1].name, made[1].sparsity, made[1].model, None, made[1].weight_bytes)  # eager too: quick
    lines: list[str] = []
    work = Workload(2, 5, 4, 9)
    found = measure(made, work, 3, lines.append)
    assert [len(r.decoding) for r in found] == [3, 3]
    assert re.fullmatch(r"round 3 of 3, ms so far: (.+: step [\d.]+, first token [\d.]+(; )?){2}", lines[-1])
    for runs in found:
        record = runs.record(work)
        assert record["tokens_per_s"] > 0 < record["long_first_token_ms"]
        assert record["peak_bytes"] is None
    assert found[0].record(Workload(2, 5, 1))["step_ms"] is None


def test_variants_of_one_name_are_timed_apart() -> None:
    calls = []

    def spy(which: int) -> Callable[[Function], Function]:
        def compile_(step: Function) -> Function:
            def run(ids: torch.Tensor) -> torch.Tensor:
                calls.append(which)
                return step(ids)

            return run

        return compile_

    model = tiny()
    work = Workload(1, 3, 2, 4)
    measure([Variant("patch 30 %", 0.3, model, spy(i), 1) for i in range(2)], work, 2)
    assert calls.count(0) == calls.count(1)


def test_what_runs_without_cuda_graphs_is_said() -> None:
    def skipping(step: Function) -> Function:
        counters["inductor"]["cudagraph_skips"] += 2
        return step

    lines: list[str] = []
    made = [Variant("one", 0.0, tiny(), None, 1), Variant("two", 0.0, tiny(), skipping, 1)]
    found = measure(made, Workload(1, 3, 2), 1, lines.append)
    assert [r.record(Workload(1, 3, 2))["without_cuda_graph"] for r in found] == [0, 2]
    assert [line for line in lines if "without" in line] == ["two: Inductor ran 2 compiled functions without CUDA graphs"]


def test_the_record_adds_up() -> None:
    variant = variants(tiny(), [], ["eager"])[0]
    runs = Runs(variant, 1.5, 10**9, [0.1, 0.3, 0.2], [0.0010, 0.0008, 0.0009])
    record = runs.record(Workload(4, 16, 10))
    assert record["tokens_per_s"] == pytest.approx(4 * 10 / 0.2009, abs=0.06)
    assert record["step_ms"] == pytest.approx(0.1)
    embedding = 300 * 128 * 4
    assert record["weights_gb_s"] == pytest.approx((variant.weight_bytes - embedding + 4 * 128 * 4) / 1e-4 / 1e9, abs=0.06)
    assert record["long_first_token_ms"] is None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_rows_of_an_embedding_unless_it_is_the_head(tied: bool, packed: bool) -> None:
    model = masked(tiny())
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if packed:
        convert(model)
    for batch in (1, 7, 1000):
        rows = 300 if tied else min(batch, 300)
        assert step_bytes(model, batch) == weight_bytes(model) - (300 - rows) * 128 * 4


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)
    return "tiny"


def test_the_command(named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, html = tmp_path / "bench.json", tmp_path / "bench.html"
    arguments = ["--batch=2", "--prompt=4", "--new=3", "--long-prompt=0", "--rounds=1", "--dense=eager", "--sparsity=0.45"]
    assert command.main([named, *arguments, "-o", str(out), "--page", str(html)]) == 0
    text = capsys.readouterr().out
    assert "Weights random" in text
    assert "patch 4" in text
    record = json.loads(out.read_text())
    assert record["rows"][0]["name"] == "dense, eager"
    assert record["provenance"]["command"] == " ".join(["python -m patch_compiler.bench tiny", *arguments])
    assert "First token of a long prompt" not in html.read_text()
    assert "Tokens a second" in html.read_text()


def test_an_interrupt_is_one_line(named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    assert command.main([named, "--dense=eager", "--sparsity=0.45"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_first_calls_meet_empty_caches_and_then_full_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCH_CACHE_DIR", str(tmp_path))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "table.json").write_text("{}")
    seen: list[tuple[list[str], dict[str, list[str]]]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        held = {name: sorted(str(p.relative_to(env[name])) for p in Path(env[name]).rglob("*.*")) for name in first_call.CACHES}
        seen.append((command, held))
        for name in first_call.CACHES:
            assert Path(env[name]) != tmp_path
            Path(env[name]).mkdir(exist_ok=True)
            (Path(env[name]) / "made.so").touch()
        out = next(a.removeprefix("-o=") for a in command if a.startswith("-o="))
        Path(out).write_text(json.dumps({"rows": [{"first_call_s": 9.0 / len(seen)}, {"first_call_s": 99.0}]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert first_call.first_calls("some/model", Workload(3, 17, 128, 64), "inductor") == (9.0, 4.5)
    (command_, cold), (again, warm) = seen
    assert command_ == again
    assert {"some/model", "--dense=inductor", "--sparsity=", "--batch=3", "--prompt=17", "--long-prompt=64"} <= set(command_)
    assert cold == {name: ["tuned/table.json"] if name == "PATCH_CACHE_DIR" else [] for name in first_call.CACHES}
    assert all("made.so" in files for files in warm.values())


def test_a_first_call_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="in a process of its own: model 'no/such/model': no such directory"):
        first_call.first_calls("no/such/model", Workload(1, 2, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_compile_times_go_to_their_variants(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(tmp_path / "model"), tmp_path / "bench.json"
    if packed:
        save_compressed(convert(masked(tiny())), source)
    else:
        tiny().save_pretrained(source)
    monkeypatch.setattr(command, "measure", lambda made, *_: [Runs(v, 1.0, None, [0.1], [0.2]) for v in made])
    known = {"inductor": (40.0, 4.0), "": (30.0, 3.0), "0.25": (20.0, 2.0), "0.5": (10.0, 1.0)}
    monkeypatch.setattr(command, "first_calls", lambda _, __, dense, sparsity: known[dense or sparsity])
    arguments = ["--dense=eager,inductor", "--sparsity=0.25,0.5", "--compile-time", "-o", str(out)]
    assert command.main([source, *arguments]) == 0
    rows = json.loads(out.read_text())["rows"]
    wanted = [(None, None), (40.0, 4.0), *([(30.0, 3.0)] if packed else [(20.0, 2.0), (10.0, 1.0)])]
    assert [(row["first_call_cold_s"], row["first_call_warm_s"]) for row in rows] == wanted
    assert {"cold", "warm"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_full_caches_save_time(tmp_path: Path) -> None:
    convert(masked(tiny())).save_pretrained(tmp_path)
    cold, warm = first_call.first_calls(str(tmp_path), Workload(2, 5, 3))
    assert 0 < warm < cold


def test_the_command_says_whose_masks_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_compressed(convert(masked(tiny())), tmp_path / "packed")
    arguments = ["--batch=1", "--prompt=2", "--new=1", "--long-prompt=0", "--rounds=1", "--dense=eager"]
    assert command.main([str(tmp_path / "packed"), *arguments]) == 0
    text = capsys.readouterr().out
    assert "Weights of the model. Dense variants are unpacked from it." in text
    assert "published" not in text


def test_the_page_escapes() -> None:
    row = Runs(variants(tiny(), [], ["eager"])[0], 1.0, None, [0.1], [0.2]).record(Workload(1, 2, 3))
    record = {
        "model": "<script>", "note": "a < b", "workload": {"batch": 1, "prompt": 2, "new": 3},
        "provenance": {"device": "<gpu>"}, "rows": [row | {"name": "<b>"}],
    }  # fmt: skip
    text = page(record)
    assert "<script>" not in text
    assert "<gpu>" not in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no/such/model/here"], "error: model 'no/such/model/here': no such directory"),
        (["tiny", "--sparsity", "0.7"], "0 to 0.5"),
        (["tiny", "--dense", "fast"], "none of eager"),
        (["tiny", "--batch", "0"], "1 or more"),
        (["tiny", "--rounds", "two"], "'two': must be a whole number"),
        (["tiny", "--long-prompt", "-3"], "'-3': must be 0 or more"),
        (["tiny", "--sparsity", "half"], "'half': must be numbers"),
        (["tiny", "--sparsity", "nan"], "0 to 0.5"),
        (["tiny", "--sparsity=", "--dense="], "nothing to measure"),
        (["tiny", "-o", "."], r"\.: is a directory"),
        (["tiny", "--page", "."], r"\.: is a directory"),
    ],
)
def test_bad_requests(named: str, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(command.main(arguments))
    assert re.search(reason, capsys.readouterr().err)


def test_an_output_that_cannot_be_written_is_known_at_once(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("its weights were made"))
    (tmp_path / "file").touch()
    for option in ("-o", "--page"):
        assert command.main([named, option, str(tmp_path / "file" / "out")]) == 2
        assert "file is not a directory one can write to" in capsys.readouterr().err


def test_a_large_model_needs_a_gpu(named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(command, "LARGEST_ON_CPU", 1000)
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("its weights were made"))
    assert command.main([named]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_parameters_are_counted_without_weights(named: str, tmp_path: Path) -> None:
    model = tiny()
    wanted = sum(p.numel() for p in model.parameters())
    assert parameter_count(named) == wanted
    save_compressed(convert(masked(model)), tmp_path / "packed")
    assert parameter_count(str(tmp_path / "packed")) == wanted
    assert parameter_count("llama-2-7b") == pytest.approx(6.74e9, rel=1e-3)


def test_select_keeps_the_largest() -> None:
    """What the packed copies keep, by name and value."""
    model = tiny()
    packed = variants(model, [0.5], [])[0].model
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight
    mask = HardMask.select(packed.get_submodule(name).tile_map, weight.abs())
    assert torch.equal(packed.get_submodule(name).dense_weight(), torch.where(mask.keep(), weight, 0.0))
