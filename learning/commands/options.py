"""What several sub-commands share: types of options, checks of the output place, how numbers are shown."""

from __future__ import annotations

import argparse
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from patch_compiler.artifact import load_masks
from patch_compiler.atomic import check_writable, existing_parent
from patch_compiler.hard_mask import HardMask
from patch_compiler.hf import MASK_FILE
from patch_compiler.text_table import human_bytes
from patch_compiler.tile_map import DEFAULT_TILE, normalize_tile

DTYPES = {"auto": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_SPARSITY = 0.35
MASK_HELP = f"mask file, or a directory with {MASK_FILE}, as `prune` and `learn` write it"
MODEL_HELP = "hub id, local directory, .gguf file, or a directory written by `prune` or `learn`"


def add_dtype_and_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's own (bfloat16 for GGUF)")
    parser.add_argument("--device", type=device, default=None, help="where to compute; default: cuda if there is one, else cpu")


def add_layers(parser: argparse.ArgumentParser) -> None:
    """Which layers, in tiles of which size."""
    parser.add_argument("--tile", type=tile, default=DEFAULT_TILE, help="tile size, 128 (default) or rows x columns as 128x64")
    parser.add_argument("--include", type=regex, metavar="REGEX", help="only layers whose path matches, such as mlp")
    parser.add_argument("--exclude", type=regex, metavar="REGEX", help="leave layers whose path matches dense")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bars while computing")


def device(text: str) -> torch.device:
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no torch device; examples: cpu, cuda, cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return chosen


def default_device(chosen: torch.device | None) -> torch.device:
    return chosen if chosen is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tile(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write 128, or rows x columns as 128x64")
    try:
        return normalize_tile((int(match[1]), int(match[2] or match[1])))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression ({error})") from None
    return text


def check_new_directory(out: Path, ours: str | None = None, overwrite: bool = False) -> None:
    """Raises ValueError unless `out` can be written: absent or empty, or (holding the file `ours`) to be overwritten."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"output {out}: is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        if ours is None or not (out / ours).is_file():
            raise ValueError(f"output {out}: exists and is not empty; name another directory")
        if not overwrite:
            raise ValueError(f"output {out}: exists; name another directory, or replace it with --overwrite")
    check_writable(out)


def check_space(out: Path, model: nn.Module, sparsity: float) -> None:
    """Raises ValueError if the disk has no room for the model without its zeros, which packed is a little larger."""
    needed = int(sum(p.nbytes for p in model.parameters()) * (1 - sparsity))
    free = shutil.disk_usage(existing_parent(out)).free
    if free < needed:
        raise ValueError(f"output {out}: its disk has {human_bytes(free)} free, the model needs {human_bytes(needed)} at least")


def read_masks(path: Path) -> dict[str, HardMask]:
    """Masks of a mask file, or of a directory that holds one, by module path. Raises ValueError (ArtifactError) or OSError for
    anything else."""
    if path.is_dir():
        path = path / MASK_FILE
    if path.suffix == ".npz":
        raise ValueError(f"mask {path}: a file of another project; `python -m learning import-mask` makes a mask file of it")
    return load_masks(path).masks


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("patch-compiler", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found
