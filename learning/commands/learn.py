"""`python -m learning learn`: from a dense model to learned masks and a compressed directory, in one process or many."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patch_compiler.atomic import atomic_file, check_writable
from patch_compiler.hard_mask import HardMask
from patch_compiler.tile_map import TileKind

from ..budget import check_budget
from ..data import describe_source, token_stream, token_windows
from ..models import LoadedModel, check_context, default_context, load_model
from ..one_shot import METHODS
from ..prune_checks import checked_linears, shape_of
from ..prune_result import PrunedLayer, PruneResult
from ..soft_masks.learn_config import LearnConfig
from ..soft_masks.learned_masks import Hardened, LearnedMasks
from ..soft_masks.priors import check_start, find_start, lacks_patterns
from ..soft_masks.start_file import is_saved, load_start, save_start
from ..token_file import TokenFile, tokenise
from ..training.distributed import Ranks, processes
from ..training.loop import TrainResult, check_precision, check_run, train
from ..training.next_token_loss import mean_loss
from ..training.state import first_difference
from ..training.stop_request import Stopped
from .learn_options import add_options, config_of
from .options import DTYPES, check_space, read_masks
from .pruned_output import PrunedOutput, check_places

EXIT_STOPPED = 75  # "try again": the run is saved and can be resumed
SETTINGS = "run.json"
_METHODS = {"tile": "patch-tile", "joint": "patch-joint", "maskllm": "maskllm"}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "learn",
        help="learn masks by gradient descent",
        description="Learn which tiles of a model's linear layers stay dense, which 2:4 patterns the others get, or both, over "
        "frozen weights, and write what `prune` writes. Several processes: torchrun --nproc-per-node N -m learning learn ...",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    config = config_of(args)
    check_places(args.model, args.output, args.overwrite)
    directory = args.run_dir or args.output.with_name(args.output.name + ".run")
    masks = read_masks(args.mask_from) if args.mask_from is not None else None  # a bad file shows at once
    try:
        with processes(args.device) as ranks:
            _Command(args, config, directory, masks, ranks).run()
    except Stopped as stop:
        print(f"\n{stop}; the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(EXIT_STOPPED) from None


class _Command:
    def __init__(
        self,
        args: argparse.Namespace,
        config: LearnConfig,
        directory: Path,
        masks: dict[str, HardMask] | None,
        ranks: Ranks,
    ) -> None:
        self.args, self.config, self.directory, self.masks, self.ranks = args, config, directory, masks, ranks
        self.progress = ranks.first and not args.quiet
        self.begun = time.perf_counter()
        self.pattern_method = "none"  # one-shot method that patterns come from
        self.opened = False  # whether this command made the run

    def run(self) -> None:
        learned = self.learn()
        # the model may be shared out by now, and its modules mask their weights: what is written is loaded afresh
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        self.ranks.first_does(lambda: self.finish(*learned))

    def learn(self) -> tuple[Hardened, int, TrainResult, float, TokenFile, int]:
        """(masks, tiles in which budget and signs differ, what training reported, the dense model's perplexity, text,
        validation windows)."""
        args, ranks = self.args, self.ranks
        check_run(self.config, ranks, args.tensorboard, args.wandb is not None)
        loaded = self.load()
        check_precision(loaded.model)
        if args.context is None:  # the published one may be too long
            self.config = replace(self.config, context=default_context(loaded.model, self.config.context))
        config = self.config
        check_context(loaded.model, config.context)
        check_space(args.output, loaded.model, 0.5)  # the most there is: PATCH's sign rule may leave its budget
        linears = checked_linears(loaded.model, args.include, args.exclude)
        shapes = {name: shape_of(module) for name, module in linears.items()}
        check_budget(config.budget, shapes, config.tile)
        check_start(config, shapes, self.masks, args.pattern_method)
        if lacks_patterns(shapes, self.masks):
            self.pattern_method = args.pattern_method
        ranks.first_does(lambda: self.open_directory(loaded))
        try:
            validation = validation_windows(loaded.tokenizer, args.validation, args.validation_windows, config.context)
            tokens = self.tokens(loaded)
            if ranks.first:
                self.describe(loaded, tokens, validation.shape[0])
            # the first process alone looks: others may see its files appear while it is at work
            ranks.first_does(lambda: None if is_saved(self.directory) else self.find_start(loaded, shapes))
        except BaseException:
            self.close_directory()
            raise
        start = load_start(self.directory, shapes)
        model = loaded.model.to(ranks.device)
        dense = math.exp(min(mean_loss(model, validation, ranks), 700.0))
        masks = LearnedMasks(model, config, start, include=args.include, exclude=args.exclude)
        result = train(
            model, masks, tokens, config, run=self.directory, resume=args.resume, validation=validation,
            validate_every=args.validate_every, save_every=args.save_every, ranks=ranks, progress=self.progress,
            tensorboard=args.tensorboard, wandb=args.wandb, recompute=not args.keep_activations,
            compiled=False if args.no_compile else None,
        )  # fmt: skip
        exact = masks.harden()
        # PATCH's code takes each tile by its logit's sign, whatever sparsity that gives
        written = masks.harden(sign_rule=True) if config.compat == "patch" else exact
        return written, exact.moved, result, dense, tokens, validation.shape[0]

    # ---- before

    def load(self) -> LoadedModel:
        loaded = load_model(self.args.model, DTYPES[self.args.dtype])
        if loaded.model.dtype == torch.float16 and self.args.dtype == "auto":
            loaded.model.to(torch.bfloat16)  # to learn with: a token's gradient is too small for float16
        return loaded

    def open_directory(self, loaded: LoadedModel) -> None:
        """It is new, or the same run's and to be resumed."""
        args, file = self.args, self.directory / SETTINGS
        settings = {
            "model": loaded.name, "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "data": [describe_source(source) for source in args.data],
            "include": args.include, "exclude": args.exclude,
            "mask_from": args.mask_from.name if args.mask_from is not None else None,
            "pattern_method": self.pattern_method,
            "calibration": [describe_source(args.calibration), args.samples, self.calibration_context()],
            "config": json.loads(json.dumps(self.config.as_json())),
        }  # fmt: skip
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"run {self.directory}: is a file; name a directory")
        if file.is_file():
            if not args.resume:
                raise ValueError(f"run {self.directory}: holds a run; go on with it by --resume, or name another directory")
            try:
                then = json.loads(file.read_text(encoding="utf-8"))
                then["config"] = LearnConfig.completed(then["config"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"run {self.directory}: its {file.name} is damaged ({error}); name another directory"
                ) from None
            found = first_difference(then, settings)
            if found is not None:
                raise ValueError(f"run {self.directory}: its {found[0]} is {found[1]!r}, now it is {found[2]!r}")
            return
        check_writable(self.directory)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.opened = True

    def close_directory(self) -> None:
        """A run that ends before it has found a start holds nothing: the next command may name the directory again."""
        if not self.opened or is_saved(self.directory):
            return
        (self.directory / SETTINGS).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are there
            self.directory.rmdir()

    def calibration_context(self) -> int:
        return min(self.args.calibration_context or 2048, self.config.context)

    def tokens(self, loaded: LoadedModel) -> TokenFile:
        config = self.config
        found: list[TokenFile] = []

        def make() -> None:
            count = config.steps * config.batch * config.context
            found.append(
                tokenise(loaded.tokenizer, self.args.data, count, config.context, seed=config.seed, progress=self.progress)
            )

        self.ranks.first_does(make)
        if not found:  # made by the first process, read by this one; or made by it, where machines share no cache
            make()
        return found[0]

    def find_start(self, loaded: LoadedModel, shapes: dict[str, tuple[int, int]]) -> None:
        args, config = self.args, self.config
        method = self.pattern_method
        needed = (config.mode != "maskllm" and config.tile_prior in ("loss", "survivors")) or (
            method != "none" and METHODS[method].needs != "nothing"
        )
        windows = None
        if needed:
            windows = token_windows(loaded.tokenizer, args.calibration, self.calibration_context(), args.samples, config.seed)
        start = find_start(
            loaded.model, config, windows, masks=self.masks, pattern_method=method, include=args.include,
            exclude=args.exclude, device=self.ranks.device, progress=self.progress,
        )  # fmt: skip
        save_start(self.directory, start, config, shapes)

    def describe(self, loaded: LoadedModel, tokens: TokenFile, windows: int) -> None:
        config, world = self.config, self.ranks.world
        seen = config.steps * config.batch
        print(loaded.introduced())
        print(
            f"{_METHODS[config.mode]}: {config.steps} steps of {config.batch} windows of {config.context} tokens, "
            f"{world} process{'es' if world > 1 else ''}, run {self.directory}"
        )
        print(f"text: {tokens.name}, {tokens.ids.size} tokens, seen {seen / len(tokens):.2f} times")
        print(f"validation: {describe_source(self.args.validation, 'test')}, {windows} windows")

    # ---- after

    def finish(
        self, hardened: Hardened, differing: int, result: TrainResult, dense: float, tokens: TokenFile, windows: int
    ) -> None:
        args, config = self.args, self.config
        last = result.validations[-1]
        by_sign = config.compat == "patch"
        assert last.sign_rule is not None  # measured after the last step
        learned = last.sign_rule if by_sign else last.hard
        perplexities = {
            "dense": dense, "learned": learned, "soft": last.soft, "on_budget": last.hard, "sign_rule": last.sign_rule,
        }  # fmt: skip
        sources = (args.mask_from.name if args.mask_from is not None else None, self.pattern_method)
        settings = {
            "include": args.include,
            "exclude": args.exclude,
            "learning": json.loads(json.dumps(config.as_json())),
            "data": {"source": tokens.name, "tokens": tokens.ids.size, "sha256": tokens.digest},
            "start": [source for source in sources if source not in (None, "none")],
            "validation": {
                "source": describe_source(args.validation, "test"), "windows": windows, "context": config.context,
                "perplexity": perplexities,
            },
            "tiles": {"all": hardened.tiles, "rule": "sign" if by_sign else "budget", "budget_and_sign_differ": differing},
            "processes": self.ranks.world,
            "device": self.ranks.device.type,
        }  # fmt: skip
        loaded = load_model(args.model, DTYPES[args.dtype])  # in the checkpoint's own precision, also where that is float16
        output = PrunedOutput(loaded, _pruned(hardened, config))
        output.write(args.output, settings, time.perf_counter() - self.begun)
        output.show(args.output)
        other = f"exactly on budget {last.hard:.4f}" if by_sign else f"by the signs of the logits {last.sign_rule:.4f}"
        print(f"perplexity on the validation windows: dense {dense:.4f}, learned {learned:.4f} (soft {last.soft:.4f}, {other})")
        if by_sign:
            print(f"every tile is what its logit's sign says; {differing} of {hardened.tiles} would differ exactly on budget")
        else:
            print(f"{differing} of {hardened.tiles} tiles differ from their logit's sign, to meet the budget exactly")


def validation_windows(tokenizer: Any, source: str | None, count: int, context: int) -> Tensor:
    """The first windows of a text in its own order, int64 [count or fewer, context]. ValueError if there is none."""
    row = token_stream(tokenizer, source, count * context)
    if row.numel() < context:
        raise ValueError(
            f"text source {describe_source(source, 'test')!r} is too short to validate on: "
            f"{row.numel()} tokens, and a window has {context}"
        )
    return row[: row.numel() // context * context].view(-1, context)


def _pruned(hardened: Hardened, config: LearnConfig) -> PruneResult:
    method = _METHODS[config.mode]
    result = PruneResult(method, "2:4" if config.mode == "maskllm" else "hybrid", config.budget.sparsity, config.tile)
    for name, mask in hardened.masks.items():
        tile_map = mask.tile_map
        dense, sparse24 = (tile_map.count(kind) for kind in (TileKind.DENSE, TileKind.SPARSE24))
        result.layers.append(PrunedLayer(name, tile_map.shape, tile_map.zeros, dense, sparse24, method))
    result.masks = hardened.masks
    return result
