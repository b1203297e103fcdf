"""Runs the PTX of codegen/isa/wgmma.py for one warpgroup, with the oracle's instructions on bytes of shared memory."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from codegen.formats import oracle

_WGMMA = re.compile(r"wgmma\.mma_async\.(sp\.)?sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16)\.\4 \{(.*?)\}, (.*)")
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


class Warpgroup:
    """threads: the first one's number in its CTA. accumulators: float64 [strips, 4 warps, 32, N / 2]."""

    def __init__(self, smem: Tensor, threads: int, strips: int, tokens: int, cta: int = 0) -> None:
        self.smem, self.cta = smem, cta
        self.tid = torch.arange(threads, threads + 128)
        self.accumulators = torch.zeros(strips, 4, 32, tokens // 2, dtype=torch.float64)

    def run(self, text: str, *addresses: int) -> None:
        """addresses: of the operands behind the accumulators, in the cluster's first CTA."""
        n = self.accumulators[:, 0, 0].numel()
        registers: dict[str, int | Tensor] = {f"${2 * n + i}": address for i, address in enumerate(addresses)}
        for accumulator in re.findall(r"\{(\$\d[^}]*)\}", text):
            assert len(accumulator.split(",")) == self.accumulators.shape[-1]
        statements = re.split(r";\s*", re.sub(r"^\{|\}$", "", re.sub(r"\{ (\.reg[^}]*)\}", r"\1", text.strip())))
        for statement in filter(None, (s.strip() for s in statements)):
            self._execute(statement, registers)

    def _execute(self, statement: str, registers: dict[str, int | Tensor]) -> None:
        if match := _WGMMA.match(statement):
            self._multiply(match, registers)
            return
        operation, _, rest = statement.partition(" ")
        names = [name.strip() for name in rest.split(",")]
        if operation in (".reg", "wgmma.fence.sync.aligned", "wgmma.commit_group.sync.aligned"):
            return
        if operation == "wgmma.wait_group.sync.aligned":
            assert names[0] in ("0", "1")
            return
        values = [self._value(name, registers) for name in names[1:]]
        if operation in ("mov.u32", "mov.b32", "cvt.u64.u32"):
            registers[names[0]] = values[0]
        elif operation == "and.b32":
            registers[names[0]] = values[0] & values[1]
        elif operation == "or.b64":
            registers[names[0]] = values[0] | values[1]
        elif operation == "shr.u32":
            registers[names[0]] = values[0] >> values[1]
        elif operation == "add.s64":
            registers[names[0]] = values[0] + values[1]
        elif operation == "mad.lo.u32":
            registers[names[0]] = values[0] * values[1] + values[2]
        elif operation == "ld.shared.b32":
            assert (values[0] >> 24 == self.cta).all(), "another CTA's memory"
            registers[names[0]] = self.smem.view(torch.int32)[(values[0] & 0xFFFFFF) // 4]
        else:
            raise AssertionError(f"unknown statement {statement}")

    def _value(self, name: str, registers: dict[str, int | Tensor]) -> int | Tensor:
        if name == "%tid.x":
            return self.tid
        if name == "%cluster_ctarank":
            return self.cta
        if match := re.fullmatch(r"\[(\w+) \+ (\d+)\]", name):
            return registers[match[1]] + int(match[2])
        return registers[name] if name in registers else int(name, 0)

    def _multiply(self, match: re.Match[str], registers: dict[str, int | Tensor]) -> None:
        sparse, n, k, dtype, accumulator, rest = match.groups()
        n, operands = int(n), rest.split(", ")
        assert int(k) == (32 if sparse else 16)
        first = int(accumulator.split(",")[0].removeprefix("$"))
        assert first % (n // 2) == 0
        strip = first // (n // 2)
        a, b = registers[operands[0]], registers[operands[1]]
        if sparse:
            assert operands[4:] == ["1", "1", "1", "0", "0"]
            metadata = registers[operands[2]].view(4, 32)
            product = oracle.wgmma_sp_m64nNk32(self.smem, a, self.smem, b, metadata, int(operands[3]), n, _DTYPES[dtype])
        else:
            assert operands[2:] == ["1", "1", "1", "0", "0"]
            product = oracle.wgmma_m64nNk16(self.smem, a, self.smem, b, n, _DTYPES[dtype])
        self.accumulators[strip] += product

    def result(self) -> Tensor:
        """float64 [64 strips, N]."""
        strips, _, _, half = self.accumulators.shape
        rows = torch.zeros(strips, 4, 16, half // 4, 8, dtype=torch.float64)
        rows[:, :, oracle.C_ROW, :, oracle.C_COLUMN] = self.accumulators.unflatten(-1, (half // 4, 4)).permute(2, 4, 0, 1, 3)
        return rows.flatten(3).flatten(0, 2)
