"""`benchmarks.soak`: many random requests through one compiled packed model."""

from __future__ import annotations

from patch_compiler.text_table import human_bytes

from .section import Record, Section, markdown_table, where_from


def section(name: str, record: Record) -> Section:
    memory = [
        (what, *(human_bytes(record[when][key]) for when in ("settled", "end")))
        for key, what in (("gpu_bytes", "allocated on the GPU"), ("resident_bytes", "process, largest so far"))
    ]
    text = [
        f"{where_from(record)}\n"
        f"{record['model']} with random weights at {record['sparsity']:.0%}: {record['requests']} requests of random shapes, "
        f"{record['tokens']} tokens, {record['graphs']} graphs.\n"
        f"Of {record['compared']} tokens compared with the masked dense model in float32, wrong: {record['wrong_tokens']}. "
        f"Largest relative error of logits {record['largest_error']:.2e};\n"
        f"of the masked dense model in the same dtype {record['dense_largest_error']:.2e}.",
        f"GPU memory {'grew' if record['grew'] else 'did not grow'} after the first fifth of the requests:",
        markdown_table(["memory", "after a fifth", "at the end"], memory),
    ]
    return Section(f"Soak: {record['requests']} requests", "\n\n".join(text))
