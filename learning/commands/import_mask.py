"""`python -m learning import-mask`: turn another project's mask into our mask file, checked against the model it is for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from patch_compiler.artifact import save_masks
from patch_compiler.atomic import atomic_file, check_writable
from patch_compiler.hard_mask import HardMask
from patch_compiler.hf import MASK_FILE, is_compressed
from patch_compiler.importers import import_dense_zeros, import_maskllm_npz, import_patch_npz
from patch_compiler.linears import get_linears, named_linears
from patch_compiler.text_table import human_bytes
from patch_compiler.tile_map import DEFAULT_TILE, sparsity_of

from ..models import load_model, load_skeleton
from ..prune_checks import shape_of
from .options import MODEL_HELP, tile


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "import-mask",
        help="read the mask of another project",
        description="Read a mask of PATCH (mask.npz), of MaskLLM (.npz) or of a dense checkpoint with zeros in place, check it "
        "against the base model and write it as a mask file for `evaluate --mask` and patch_compiler.apply_masks.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="the .npz file; for --format dense the pruned checkpoint (hub id or directory)"
    )
    parser.add_argument("model", metavar="MODEL", help="base model that the mask is for: " + MODEL_HELP)
    parser.add_argument("--format", choices=("patch", "maskllm", "dense"), required=True)
    parser.add_argument("--tile", type=tile, default=DEFAULT_TILE, help="tile size where FILE does not say it; default 128")
    parser.add_argument("-o", "--output", metavar="MASK", type=Path, required=True, help="mask file to write (.safetensors)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing MASK")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise ValueError(f"output {args.output}: exists; name another file, or replace a file with --overwrite")
    check_writable(args.output)
    if args.format != "dense" and not Path(args.file).is_file():
        raise ValueError(f"mask {args.file!r}: no such file")
    if args.format == "dense" and is_compressed(args.file):
        raise ValueError(f"{args.file}: is a packed model, no dense checkpoint; its masks lie in it, in {MASK_FILE}")
    skeleton = load_skeleton(args.model)
    masks = _read(args, skeleton)
    if not masks:
        raise ValueError(f"{args.file}: no layer of it is sparse")
    get_linears(skeleton, masks)
    with atomic_file(args.output) as partial:
        provenance = {"imported_from": Path(args.file).name, "format": args.format}
        path = Path(args.model).expanduser()
        save_masks(partial, masks, base_model=path.resolve().name if path.exists() else args.model, provenance=provenance)
    weights = sum(m.tile_map.weights for m in masks.values())
    sparsity = sparsity_of(m.tile_map for m in masks.values())
    size = args.output.stat().st_size
    print(f"{len(masks)} layers, sparsity {sparsity:.2%}, {8 * size / weights:.2f} bits a weight")
    print(f"wrote {args.output}, {human_bytes(size)}")
    model, mask = shlex.quote(args.model), shlex.quote(str(args.output))
    print(f"next: python -m learning evaluate {model} --mask {mask}")


def _read(args: argparse.Namespace, skeleton: nn.Module) -> Mapping[str, HardMask]:
    if args.format == "patch":
        return import_patch_npz(args.file, args.tile)
    if args.format == "maskllm":
        shapes = {name: shape_of(module) for name, module in named_linears(skeleton).items()}
        return import_maskllm_npz(args.file, shapes, args.tile)
    return import_dense_zeros(load_model(args.file).model, args.tile)
