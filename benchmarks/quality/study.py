"""Every method of the field on one real model, on one footing: perplexity on text that none of them saw.

    python -m benchmarks.quality.study TEXTS OUT [--budget SECONDS] [--steps 300] [--only REGEX] [--workers 5]

TEXTS: what `benchmarks.quality.texts` wrote. OUT: a JSON file; rows that it already has are not made again, so a study goes on
where its last call's budget ended; each row says where it was made. A row that fails is printed and is not in the file; the
others are made, and the exit status is 1. All calibrate on the same windows and learn from the same text. ProxSparse learns: it
takes as many windows of that text as its paper does. Where a row ends with masks, the dense model is also refitted to them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.demo_model import demo_model
from learning.calibration import Calibration, calibrate
from learning.evaluation.perplexity import perplexity
from learning.models import load_model
from learning.prune import prune
from learning.refit import refit
from learning.soft_masks.learned_masks import LearnedMasks
from learning.soft_masks.priors import find_start
from learning.token_file import TokenFile
from learning.training.loop import train
from patch_compiler.hard_mask import HardMask
from patch_compiler.linears import named_linears, weight_of
from patch_compiler.provenance import provenance, write_results
from patch_compiler.tile_map import sparsity_of

from .rows import PROXSPARSE_WINDOWS, Row, learn_config, rows
from .three_of_four import prune_three_of_four
from .workers import shared_out

CALIBRATION_WINDOWS = 64


class Study:
    """The model, its texts, and what several rows share: one calibration, one 2:4 mask to start from."""

    def __init__(self, texts: Path, device: torch.device, args: argparse.Namespace) -> None:
        self.args, self.device, self.context = args, device, args.context
        loaded = load_model(str(demo_model()), torch.bfloat16)
        self.name, self.note = loaded.name, loaded.note
        self.model: nn.Module = loaded.model.to(device)
        self.train = TokenFile.of(_ids(texts / "train.npy"), self.context, "train")
        self.heldout, self.development = _ids(texts / "heldout.npy"), _ids(texts / "development.npy")
        if args.tokens is not None:
            self.heldout, self.development = self.heldout[: args.tokens], self.development[: args.tokens]
        self.windows = self.spread_windows(CALIBRATION_WINDOWS)
        self._calibration: Calibration | None = None
        self._patterns: dict[str, HardMask] | None = None

    def spread_windows(self, count: int) -> Tensor:
        """int64 [count, context], at even distances in the text that is learned from."""
        return self.train.windows(torch.arange(count) * (len(self.train) // count))

    @property
    def calibration(self) -> Calibration:
        if self._calibration is None:
            self._calibration = calibrate(self.model, self.windows, progress=False)
        return self._calibration

    @property
    def patterns(self) -> dict[str, HardMask]:
        """Of SparseGPT, MaskLLM's best prior; for weights as they were."""
        if self._patterns is None:
            model = copy.deepcopy(self.model)
            self._patterns = prune(model, self.windows, method="sparsegpt", pattern="2:4", progress=False).masks
        return self._patterns

    def measure(self, row: Row) -> dict[str, Any]:
        gc.collect()  # a row that failed leaves a model whose layers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin, before = time.perf_counter(), _peak(self.device)
        model, masks, more = self._made(row)
        made = time.perf_counter() - begin
        weights = [weight_of(module).numel() for module in named_linears(self.model).values()]
        chosen = [weight_of(module).numel() for module in named_linears(self.model, row.include).values()]
        found = {
            "name": row.name, "kind": row.kind, "method": row.method, "pattern": row.pattern, "sparsity": row.sparsity,
            "tile": row.tile, "include": row.include, "seed": row.seed, "settings": [list(s) for s in row.settings],
            **more, "overall": more["reached"] * sum(chosen) / sum(weights), "seconds": round(made, 1),
            "peak_gb": round((_peak(self.device) - before) / 1e9, 2),
        }  # fmt: skip
        found |= self._perplexities(model)
        del model
        if masks:
            refitted = copy.deepcopy(self.model)
            refit(refitted, masks, self.windows, progress=False)
            found |= {f"{text}_refitted": value for text, value in self._perplexities(refitted).items()}
        return found

    def _perplexities(self, model: nn.Module) -> dict[str, float]:
        texts = {"heldout": self.heldout, "development": self.development}
        return {text: round(perplexity(model, ids, self.context, progress=False).value, 4) for text, ids in texts.items()}

    def _made(self, row: Row) -> tuple[nn.Module, dict[str, HardMask], dict[str, Any]]:
        """(model, its masks, none where it has no tiles, what else is to say)"""
        if row.kind == "dense":
            return self.model, {}, {"reached": 0.0}
        if row.kind == "three of four":
            return prune_three_of_four(self.model, self.windows), {}, {"reached": row.sparsity}
        model = copy.deepcopy(self.model)
        if row.kind == "one-shot":
            needs = row.pattern == "hybrid" and row.method != "magnitude"
            windows = self.spread_windows(PROXSPARSE_WINDOWS) if row.method == "proxsparse" else self.windows
            result = prune(
                model, windows, method=row.method, pattern=row.pattern, tile=row.tile, include=row.include,
                sparsity=None if row.pattern == "2:4" else row.sparsity, calibration=self.calibration if needs else None,
                progress=False,
            )  # fmt: skip
            return model, result.masks, {"reached": result.sparsity}
        return self._learned(row, model)

    def _learned(self, row: Row, model: nn.Module) -> tuple[nn.Module, dict[str, HardMask], dict[str, Any]]:
        args = self.args
        config = learn_config(row, args.steps, args.batch, args.micro_batch, self.context)
        start = find_start(
            model, config, self.windows, masks=self.patterns, calibration=self.calibration, include=row.include, progress=False
        )
        masks = LearnedMasks(model, config, start, include=row.include)
        with masks.hard():
            first = perplexity(model, self.development, self.context, progress=False).value
        result = train(
            model, masks, self.train, config, progress=sys.stderr.isatty(), validate_every=args.steps, recompute=False
        )
        hardened, by_sign = masks.harden(), masks.harden(sign_rule=True)
        with masks.hard(by_sign):
            sign = perplexity(model, self.heldout, self.context, progress=False).value
        used = by_sign if config.compat == "patch" else hardened  # PATCH's code hardens by sign and takes what comes
        masks.apply(used)
        return model, used.masks, {
            "reached": sparsity_of(m.tile_map for m in used.masks.values()),
            "reached_by_sign": sparsity_of(m.tile_map for m in by_sign.masks.values()),
            "moved_tiles": hardened.moved, "tiles": hardened.tiles, "start_development": round(first, 4),
            "heldout_by_sign": round(sign, 4), "tokens": result.tokens, "train_seconds": round(result.seconds, 1),
            "step_ms": round(1e3 * result.seconds / config.steps, 1), "loss": result.loss,
        }  # fmt: skip


def _ids(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path).astype(np.int64))


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def measured(texts: Path, args: argparse.Namespace, worker: int, wanted: Iterable[Row]) -> Iterator[tuple[Row, Any]]:
    """(row, what was found, or None where it failed) for each; workers take the GPUs in turn."""
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", worker % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    study = Study(texts, device, args)
    for row in wanted:
        try:
            yield row, study.measure(row) | {"model": study.name, "note": study.note}
        except Exception as error:  # the GPU is rented: the other rows are made
            traceback.print_exc()
            print(f"{row.name:48} failed: {type(error).__name__}: {error}", flush=True)
            yield row, None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.study", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("texts", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--budget", type=float, help="seconds after which no new row is begun")
    parser.add_argument("--only", default="", help="rows whose name this regular expression finds")
    parser.add_argument("--workers", type=int, default=1, help="processes, shared out over the GPUs")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="windows of a step")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, help="of held-out text, to try things out; default all")
    args = parser.parse_args(argv)
    until = None if args.budget is None else time.monotonic() + args.budget
    settings = {name: getattr(args, name) for name in ("steps", "batch", "micro_batch", "context", "tokens")}
    record: dict[str, Any] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    if record and record["settings"] != settings:
        print(f"error: {args.output} was made with {record['settings']}, not {settings}", file=sys.stderr)
        return 2
    record |= {"settings": settings, "texts": json.loads((args.texts / "texts.json").read_text())}
    made = {row["name"] for row in record.setdefault("rows", [])}
    wanted = [row for row in rows() if re.search(args.only, row.name) and row.name not in made]
    failed = 0
    for row, found in shared_out(partial(measured, args.texts, args), wanted, args.workers, until):
        if found is None:
            failed += 1
            continue
        record |= {key: found.pop(key) for key in ("model", "note")}
        facts = provenance("benchmarks.quality.study", [])
        where = {key: facts[key] for key in ("device", "commit", "date")} | {"workers": args.workers}
        record["rows"].append(found | where)
        write_results(args.output, facts, {k: v for k, v in record.items() if k != "provenance"})
        texts = " ".join(f"{found[text]:10.3f}" for text in ("heldout", "development"))
        print(f"{row.name:60} {texts} {found['reached']:.4%} {found['seconds']:7.1f} s", flush=True)
    left = len(wanted) - sum(row["name"] not in made for row in record["rows"])
    if left:
        print(f"rows not made: {left}; failed: {failed}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
