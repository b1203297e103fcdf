"""`benchmarks.soak`: many random requests through one compiled packed model."""

from __future__ import annotations

from patch_compiler.text_table import human_bytes

from .section import Record, Section, markdown_table, where_from

MEMORY = {"gpu_bytes": "allocated on the GPU", "resident_bytes": "resident memory of the process", "tensors": "living tensors"}


def section(name: str, record: Record) -> Section:
    def shown(key: str, value: int) -> str:
        return human_bytes(value) if key.endswith("bytes") else str(value)

    memory = [(what, *(shown(key, record[when][key]) for when in ("settled", "end"))) for key, what in MEMORY.items()]
    grew = [MEMORY[key] for key in record["grew"]]
    text = [
        f"{where_from(record)}\n"
        f"{record['model']} with random weights at {record['sparsity']:.0%}: {record['requests']} requests of random shapes, "
        f"{record['tokens']} tokens, {record['graphs']} graphs.\n"
        f"Of {record['compared']} tokens compared with the masked dense model in float32, wrong: {record['wrong_tokens']}. "
        f"Largest relative error of logits {record['largest_error']:.2e};\n"
        f"of the masked dense model in the same dtype {record['dense_largest_error']:.2e}.",
        "The second half of the requests repeats the first, so that what grows then is a leak. "
        + (f"Grown by more than allowed: {', '.join(grew)}." if grew else "Nothing grew by more than allowed."),
        markdown_table(["", "in the middle", "at the end"], memory),
    ]
    return Section(f"Soak: {record['requests']} requests", "\n\n".join(text))
