"""The options of `python -m learning learn`, and the settings they make."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ..one_shot import METHODS
from ..soft_masks.learn_config import Compat, LearnConfig, Mode, Precision, Ramp, Relaxing, TilePrior, TrainingBudget
from .budget_options import add_budget, budget_of
from .options import DEFAULT_SPARSITY, MASK_HELP, add_dtype_and_device, add_layers, add_quiet, positive
from .pruned_output import add_output

# of LearnConfig, by name; what is not given keeps its published value
_NUMBERS: dict[str, tuple[Any, str]] = {
    "steps": (positive, "optimizer steps"),
    "batch": (positive, "windows of a step, over all processes"),
    "micro_batch": (positive, "windows of a forward pass of a process"),
    "context": (positive, "tokens of a window; at most the model's maximum"),
    "lr": (float, "peak learning rate"),
    "tile_lr": (float, "learning rate of the tiles' logits, as a multiple of --lr"),
    "warmup": (int, "steps to reach --lr"),
    "final_lr": (float, "learning rate of the last step, as a share of --lr"),
    "weight_decay": (float, "of pattern logits"),
    "clip": (float, "largest norm of the gradient"),
    "density_penalty": (float, "with --training-budget penalty"),
    "norm_reward": (float, "for the kept weights' squared norm"),
    "prior_strength": (float, "how far the first logits lie apart, in their standard deviations"),
    "settle": (float, "share of the run, at its end, over which the tiles' noise falls to a twentieth"),
    "seed": (int, "of the noise, the first logits and the order of the text"),
}
_RAMPS = {
    "tile_scale": ("tiles", "scale"),
    "tile_temperature": ("tiles", "temperature"),
    "pattern_scale": ("patterns", "scale"),
    "pattern_temperature": ("patterns", "temperature"),
}
# what a mode does not learn, and the options about that
_USELESS: dict[str, tuple[str, tuple[str, ...]]] = {
    "maskllm": (
        "tiles",
        ("tile_lr", "settle", "training_budget", "density_penalty", "tile_prior", "tile_scale", "tile_temperature"),
    ),
    "tile": ("patterns", ("weight_decay", "precision", "pattern_scale", "pattern_temperature")),
}
_CHOICES: dict[str, tuple[Any, str]] = {
    "training_budget": (TrainingBudget, "hold the expected density exactly, or punish what is off (PATCH)"),
    "tile_prior": (
        TilePrior,
        "which tiles are dense at first: by the loss they save, by surviving weights (PATCH), those of --mask-from, none",
    ),
    "precision": (Precision, "of pattern logits and their optimizer state; compact needs patch-compiler[learn]"),
    "compat": (Compat, "make the choices of PATCH's public code"),
}


def add_options(parser: Any) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, local directory or .gguf file")
    parser.add_argument(
        "--mode", choices=get_args(Mode), required=True, help="tile: which tiles are dense; joint: the 2:4 patterns too; "
        "maskllm: 2:4 patterns everywhere",
    )  # fmt: skip
    parser.add_argument(
        "--sparsity", type=float, help=f"zeros / weights over the layers, default {DEFAULT_SPARSITY}; maskllm is always 0.5"
    )
    add_budget(parser)
    add_layers(parser)
    add_output(parser)

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", metavar="SOURCE", nargs="+", default=[None],
        help="text to learn on: files, directories, hub datasets as owner/name[:config][:split]; several share the tokens "
        "equally. Default: text shipped with the package, which is short",
    )  # fmt: skip
    text.add_argument("--validation", metavar="SOURCE", help="text to validate on; default: shipped held-out text")
    text.add_argument("--validation-windows", metavar="N", type=positive, default=16, help="how much of it, default 16")

    start = parser.add_argument_group("start")
    start.add_argument(
        "--mask-from", metavar="MASK", type=Path, help=f"2:4 patterns from the tiles that are 2:4 there: {MASK_HELP}"
    )
    start.add_argument(
        "--pattern-method", choices=sorted([*METHODS, "none"]), default="sparsegpt",
        help="patterns that no mask file gives: from this one-shot method, default sparsegpt",
    )  # fmt: skip
    start.add_argument("--calibration", metavar="SOURCE", help="text for it; default: text shipped with the package")
    start.add_argument("--samples", type=positive, default=128, help="windows of it, default 128")
    start.add_argument("--calibration-context", type=positive, help="tokens in each; default 2048, at most --context")

    training = parser.add_argument_group("training; defaults are the published values for mode and sparsity")
    for name, (kind, words) in _NUMBERS.items():
        training.add_argument(_flag(name), type=kind, help=words)
    for name in _RAMPS:
        training.add_argument(_flag(name), type=_ramp, metavar="FIRST:LAST", help="a straight line over the run")
    for name, (choices, words) in _CHOICES.items():
        training.add_argument(_flag(name), choices=get_args(choices), help=words)
    training.add_argument("--shared-noise", action="store_true", help="one sample of the masks a step, not a micro-batch")
    training.add_argument(
        "--keep-activations", action="store_true", help="do not recompute them in the backward pass: faster, much more memory"
    )
    training.add_argument(
        "--no-compile", action="store_true",
        help="no torch.compile of blocks and loss: default on a GPU, unless processes share pattern logits",
    )  # fmt: skip

    run = parser.add_argument_group("run")
    run.add_argument("--run-dir", metavar="DIR", type=Path, help="checkpoints and metrics; default OUT.run")
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in DIR, if there is one; with any number of processes",
    )
    run.add_argument("--validate-every", metavar="STEPS", type=positive, default=100, help="default 100")
    run.add_argument("--save-every", metavar="STEPS", type=positive, default=100, help="default 100; two are kept")
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files into DIR")
    run.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases")
    add_dtype_and_device(parser)
    add_quiet(parser)


def config_of(args: argparse.Namespace) -> LearnConfig:
    """The published settings for mode and sparsity, with what was given in their place. ValueError as LearnConfig, and for
    options that this run would not look at."""
    _check_useful(args)
    default = 0.5 if args.mode == "maskllm" else DEFAULT_SPARSITY
    budget = budget_of(args, default if args.sparsity is None else args.sparsity)
    given = {name: getattr(args, name) for name in (*_NUMBERS, *_CHOICES) if getattr(args, name) is not None}
    config = LearnConfig.published(args.mode, budget, tile=args.tile, shared_noise=args.shared_noise, **given)
    for name, (kind, which) in _RAMPS.items():
        if (ramp := getattr(args, name)) is not None:
            relaxing: Relaxing = getattr(config, kind)
            changes: dict[str, Any] = {kind: replace(relaxing, **{which: ramp})}
            config = replace(config, **changes)
    return config


def _check_useful(args: argparse.Namespace) -> None:
    what, names = _USELESS.get(args.mode, ("", ()))
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"{_flag(name)} has no use in mode {args.mode}, which learns no {what}")
    if args.density_penalty is not None and args.training_budget != "penalty" and args.compat != "patch":
        raise ValueError("--density-penalty has no use without --training-budget penalty")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _ramp(text: str) -> Ramp:
    first, _, last = text.partition(":")
    try:
        return Ramp(float(first), float(last or first))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write FIRST:LAST, both positive, such as 4:0.05 ({error})") from None
