"""Emission: one specialised Triton module for each schedule, written to a cache directory and loaded from there.

A kernel family (codegen/kernels/*.py) is a working module whose constants stand in one block. Emission rewrites that block
with a schedule's values and the text of its instructions, so what is read in the cache is what runs (with the operand layouts
of codegen/kernels/fragments.py, which the families on mma share).

The file's name holds a hash of its content and of the versions; its last line a checksum, so that a damaged or foreign file
is written again. Writing is atomic: processes may share the directory.

TORCH_LOGS="codegen.emit" prints where each module is, TORCH_LOGS="+codegen.emit" its text too.
"""

from __future__ import annotations

import hashlib
import linecache
import logging
import re
import sys
import threading
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from codegen.decode_schedule import Decode
from codegen.isa import arrivals, mbarrier, mma_sp, movmatrix, wgmma, wgmma_sp
from codegen.prefill_schedule import Prefill
from codegen.schedule import Fused
from codegen.tensor_schedule import TensorPrefill
from patch_compiler.atomic import atomic_file
from patch_compiler.cache import cache_directory, writable_directory

log = logging.getLogger(__name__)

_FAMILIES = {
    "hopper": ("hopper_decode.py", "hopper_decode"),
    "stream": ("stream.py", "stream_decode"),
    "prefill": ("hopper_prefill.py", "hopper_prefill"),
    "tensor": ("tensor.py", "tensor_prefill"),
}
_PTX_DTYPES = {"bfloat16": "bf16", "float16": "f16"}
_BEGIN = "# --- schedule: codegen/emit.py rewrites this block ---\n"
_END = "# --- end of schedule ---\n"
_CHECKSUM = "# sha256 of the text above: "


@dataclass(frozen=True)
class Specialisation:
    """A schedule and what of the layer its module depends on. rows: of a panel. dtype: "bfloat16" or "float16".

    gated: the kernel ends with silu(gate) * up; only of schedules that can.
    """

    schedule: Fused
    rows: int
    dtype: str
    bias: bool
    gated: bool = False

    def constants(self) -> dict[str, str]:
        """The schedule block: name -> Python expression inside gl.constexpr(...)."""
        s = self.schedule
        values = {"DTYPE": f"gl.{self.dtype}", "ROWS": str(self.rows), "TOKENS": str(s.tokens), "HAS_BIAS": str(self.bias)}
        if isinstance(s, Prefill):
            return values | self._prefill(s)
        values["STAGES"] = str(s.stages)
        if isinstance(s, TensorPrefill):
            return values | self._tensor(s)
        values["ROWS"] = str(s.cta_rows(self.rows))
        return values | (self._hopper_decode(s) if s.family == "hopper" else self._mma())

    def _hopper_decode(self, s: Decode) -> dict[str, str]:
        return {
            "PARTS_AT_ONCE": str(parts_at_once(s.tokens)),
            "EARLY_START": str(s.early_start),
            "GATED": str(self.gated),
            "HALVES": str(s.halves),
            "SPARSE_PRODUCT": _text(wgmma_sp.slab_product(s.tokens, _PTX_DTYPES[self.dtype])),
            "SPARSE_OPERANDS": _text(wgmma_sp.slab_constraints(s.tokens)),
        }

    def _prefill(self, s: Prefill) -> dict[str, str]:
        strips, dtype = s.height(self.rows) // 64, _PTX_DTYPES[self.dtype]
        return {
            "PANELS": str(s.panels),
            "TOKEN_CTAS": str(s.token_ctas),
            "PANEL_CTAS": str(s.panel_ctas),
            "X_STAGES": str(s.x_stages),
            "W_STAGES": str(s.w_stages),
            "SPLIT": str(s.split),
            "OUT_TOKENS": str(s.out_tokens(self.rows)),
            "EARLY_START": str(s.early_start),
            "DENSE": _text(wgmma.dense_block(strips, s.tokens, dtype)),
            "SPARSE_0": _text(wgmma.sparse_half(0, self.rows, strips, s.tokens, dtype)),
            "SPARSE_1": _text(wgmma.sparse_half(1, self.rows, strips, s.tokens, dtype)),
            "DENSE_OPERANDS": _text(wgmma.constraints(strips, s.tokens, 2)),
            "SPARSE_OPERANDS": _text(wgmma.constraints(strips, s.tokens, 3)),
            "WAIT": _text(mbarrier.wait(s.ctas)),
            "RELEASE_X": _text(mbarrier.release(s.ctas, everywhere=s.cluster == "panels")),
            "RELEASE_W": _text(mbarrier.release(s.ctas, everywhere=s.cluster == "tokens")),
            "ARRIVE": _text(arrivals.arrive()),
            "ARRIVE_LAST": _text(arrivals.arrive_last()),
            "ARRIVE_OPERANDS": _text(arrivals.CONSTRAINTS),
        }

    def _tensor(self, s: TensorPrefill) -> dict[str, str]:
        return self._mma() | {
            "WARPS": str(s.warps),
            "TRANSPOSE": _text(movmatrix.transpose()),
            "TRANSPOSE_OPERANDS": _text(movmatrix.constraints()),
        }

    def _mma(self) -> dict[str, str]:
        dtype = _PTX_DTYPES[self.dtype]
        return {
            "DENSE_STEP": _text(mma_sp.dense_step(dtype)),
            "SPARSE_STEP_0": _text(mma_sp.sparse_step(dtype, 0)),
            "SPARSE_STEP_1": _text(mma_sp.sparse_step(dtype, 1)),
            "DENSE_OPERANDS": _text(mma_sp.dense_constraints()),
            "SPARSE_OPERANDS": _text(mma_sp.sparse_constraints()),
        }

    @property
    def warps(self) -> int:
        """That compute, or of the first of two warpgroups that do."""
        s = self.schedule
        if isinstance(s, Prefill):
            return 4
        return s.warps if isinstance(s, TensorPrefill) else s.cta_rows(self.rows) // 16


def parts_at_once(tokens: int) -> int:
    """Parts of a panel loaded together when they are added up: what fits the registers."""
    return max(1, min(8, 128 // tokens))


_loaded: dict[Specialisation, Any] = {}
_lock = threading.Lock()


def kernel(specialisation: Specialisation, made_for: str = "") -> Any:
    """The JIT function of a specialised module, emitted if it is not in the cache. made_for: a line for its header."""
    found = _loaded.get(specialisation)
    if found is None:
        with _lock:
            found = _loaded.get(specialisation)
            if found is None:
                found = getattr(module(specialisation, made_for), _FAMILIES[specialisation.schedule.family][1])
                _loaded[specialisation] = found
    return found


def module(specialisation: Specialisation, made_for: str = "", directory: Path | None = None) -> ModuleType:
    """Emitted and loaded. What runs is the text that was checked, whatever becomes of the file."""
    path, text = _emitted(specialisation, made_for, directory)
    loaded = ModuleType(f"patch_kernel_{path.stem}")
    loaded.__file__ = str(path)
    # Triton reads the source of a module's functions back; an entry without a time is not compared with the file
    linecache.cache[str(path)] = len(text), None, text.splitlines(keepends=True), str(path)
    sys.modules[loaded.__name__] = loaded
    exec(compile(text, path, "exec", dont_inherit=True), loaded.__dict__)
    return loaded


def emit(specialisation: Specialisation, made_for: str = "", directory: Path | None = None) -> Path:
    """Write the module unless a sound copy is there; returns its path. directory: default `kernels` in the cache directory.

    A copy that came with an image is used where it lies, also if nothing can be written beside it.
    """
    return _emitted(specialisation, made_for, directory)[0]


def _emitted(specialisation: Specialisation, made_for: str, directory: Path | None) -> tuple[Path, str]:
    """The module's path, and its text as it was read or written."""
    body = source(specialisation)
    s = specialisation.schedule
    key = hashlib.sha256(f"{body}\n{_versions()}".encode()).hexdigest()[:16]
    stages = s.x_stages if isinstance(s, Prefill) else s.stages
    name = f"{s.family}_{specialisation.rows}r_{s.tokens}t_{stages}s_{key}.py"
    path = (directory or cache_directory() / "kernels") / name
    text = _sound(path, body)
    if text is None and directory is None:
        path = writable_directory("kernels") / name
        text = _sound(path, body)
    if text is None:
        header = f"# Emitted from codegen/kernels/{_FAMILIES[s.family][0]}, {_versions()}. Rebuilt when it does not match.\n"
        header += f"# Schedule: {s}. First made for: {made_for or 'no layer in particular'}\n"
        text = f"{header}{body}{_CHECKSUM}{hashlib.sha256(f'{header}{body}'.encode()).hexdigest()}\n"
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
        log.info("emitted %s", path)
    else:
        log.info("reused %s", path)
    log.debug("%s", body)
    return path, text


def source(specialisation: Specialisation) -> str:
    """The family's module with the schedule's constants in place of its own."""
    family = Path(__file__).parent / "kernels" / _FAMILIES[specialisation.schedule.family][0]
    text = family.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    block, after = rest.split(_END)
    for name, value in specialisation.constants().items():
        line = re.compile(rf"^{name} = gl\.constexpr\(.*?\)(  #.*)?$", re.M)
        found = line.findall(block)
        if len(found) != 1:
            raise RuntimeError(f"{family.name}: its schedule block has {len(found)} lines for {name}")
        block = line.sub(lambda _, new=f"{name} = gl.constexpr({value}){found[0]}": new, block)  # type: ignore[misc]
    before = re.sub(r"^from codegen\.isa import .*\n", "", before, flags=re.M)  # the text of the instructions is here now
    return before + _BEGIN + block + _END + after


def _text(instructions: str) -> str:
    """A string literal that keeps its lines."""
    return f'"""{instructions}"""' if "\n" in instructions else repr(instructions)


def _versions() -> str:
    try:
        package = version("patch-compiler")
    except PackageNotFoundError:
        package = "from source"
    return f"patch-compiler {package}, Triton {version('triton')}"


def _sound(path: Path, body: str) -> str | None:
    """The file's text if it is undamaged and holds this module under whatever header."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    held, mark, checksum = text.rpartition(_CHECKSUM)
    whole = bool(mark) and held.endswith(body) and checksum.strip() == hashlib.sha256(held.encode()).hexdigest()
    return text if whole else None
