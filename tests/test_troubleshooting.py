"""docs/troubleshooting.md: every message it quotes exists, every reason that `explain` gives is on it, its example is real."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.readme import ROOT
from patch_compiler import convert, explanation, named_linears

from .models import tiny_model
from .strategies import random_hard_mask

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PLAIN = " ".join(PAGE.split())
PACKAGES = ("patch_compiler", "passes", "codegen")
VARIABLE = "…"


def cells(column: str) -> list[str]:
    """What stands quoted in the first column of the tables that are headed so."""
    found: list[str] = []
    for table in re.findall(rf"^\| `?{column}`? \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.M):
        for row in table.splitlines():
            first = row.split(" | ")[0]
            found += [a or b for a, b in re.findall(r"``(.+?)``(?!`)|`([^`]+)`", first)]
    return found


def text_of(node: ast.AST | None) -> str | None:
    """A string in the source, with a VARIABLE for what is formatted into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VARIABLE for part in node.values)
    return None


def strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = text_of(node)
        if text is not None:
            yield text


SOURCE = [text for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")) for text in strings(path)]


def matches(quoted: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, quoted.split(VARIABLE))), text, re.S) is not None


@pytest.mark.parametrize("quoted", [*cells("why"), *cells("message")])
def test_quoted_messages_exist(quoted: str) -> None:
    constant = max(quoted.split(VARIABLE), key=len)
    assert len(constant) > 8, "too little to find it by"
    assert [text for text in SOURCE if matches(quoted, text)]


def test_what_is_not_there_is_not_found() -> None:
    assert not [text for text in SOURCE if matches("the weight no longer … a tile map of my shape", text)]
    assert len(cells("why")) > 20
    assert len(cells("message")) > 20


def reasons(path: Path) -> Iterator[str]:
    """Strings that become a site's `reason`: assigned, returned or passed under that name, or raised where a mask is read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Assign):
            named = {getattr(t, "attr", getattr(t, "id", "")) for t in node.targets}
            values = [node.value] if named & {"reason", "_TRAINED", "why"} else []
        elif isinstance(node, ast.AugAssign):
            values = [node.value] if getattr(node.target, "attr", "") == "reason" else []
        elif isinstance(node, ast.keyword):
            values = [node.value] if node.arg == "reason" else []
        elif isinstance(node, ast.FunctionDef) and node.name == "_decide":
            returned = [r.value for r in ast.walk(node) if isinstance(r, ast.Return)]
            values = [v.elts[1] for v in returned if isinstance(v, ast.Tuple)]
        elif isinstance(node, ast.FunctionDef) and node.name == "_source":
            values = [r.exc.args[0] for r in ast.walk(node) if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)]
        elif isinstance(node, ast.FunctionDef) and node.name in (
            "_eager_packed",
            "why_not",
            "why_no_slabs",
            "why_canonical",
            "why_untileable",
        ):
            values = [s for s in ast.walk(node) if isinstance(s, ast.Constant | ast.JoinedStr) and " " in (text_of(s) or "")]
            values = [s for s in values if text_of(s) != ast.get_docstring(node, clean=False)]
        for value in values:
            parts = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
            yield from (text for part in parts if (text := text_of(part)) is not None)


def test_every_reason_is_on_the_page() -> None:
    files = [
        *sorted((ROOT / "passes").glob("*.py")),
        ROOT / "patch_compiler/explanation.py",
        ROOT / "codegen/formats/slab_map.py",
        ROOT / "codegen/slab_choice.py",
    ]
    found = {text for path in files for text in reasons(path)}
    assert len(found) > 20
    missing = {text for text in found if max(text.split(VARIABLE), key=len).strip() not in PLAIN}
    assert missing == set()


def test_what_runs_is_on_the_page() -> None:
    names = {explanation.HYBRID, explanation.DENSE, explanation.TRITON, explanation.TORCH}
    assert set(cells("runs")) == names | {f"{explanation.DENSE}, mask folded once", "eager"}


def test_messages_of_others_are_theirs() -> None:
    homes = {
        "Unknown quantization type, got": "transformers/quantizers/auto.py",
        "hit config.": "torch/_dynamo/convert_frame.py",
    }
    packages = Path(torch.__file__).parents[1]
    for message, module in homes.items():
        assert message in PLAIN
        assert message in (packages / module).read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the example is of a machine without a GPU")
@pytest.mark.usefixtures("fresh_compiler")
def test_the_example_prints_what_the_page_shows(capsys) -> None:
    """But for what depends on random weights: how many tiles of a kind, and so how many bytes."""
    match = re.search(r"<!-- example -->\n```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.S)
    assert match is not None
    exec(match[1], {})
    printed = capsys.readouterr().out
    shown, real = (_rows(text) for text in (match[2], printed))
    assert shown == real


def _rows(text: str) -> list[list[str]]:
    """Of each line what stands in its columns, by the rule below the header; the columns of counts left out."""
    lines = text.strip().splitlines()
    rule = next(line for line in lines if set(line) <= {"─", " "})
    columns = [m.span() for m in re.finditer("─+", rule)]
    counts = {2, 4}
    return [[lines[0]]] + [
        [line[a:b].strip() for i, (a, b) in enumerate(columns) if i not in counts] for line in lines[1:] if line != rule
    ]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("dynamic", "graphs", "word"), [(None, 6, "six graphs"), (True, 4, "`dynamic=True` four")])
def test_as_many_graphs_as_the_page_says_meet_all_sizes(dynamic: bool | None, graphs: int, word: str) -> None:
    assert word in PLAIN
    model = tiny_model("llama")
    convert(model, {n: random_hard_mask(tuple(m.weight.shape), 16) for n, m in named_linears(model).items() if "layers" in n})
    fast = torch.compile(model, backend="eager", dynamic=dynamic, fullgraph=True)  # Dynamo decides, whatever compiles after it
    before = counters["stats"]["unique_graphs"]
    sizes = [(2, 9), (2, 17), (3, 9), (1, 9), (2, 1), (1, 1), (4, 30), (1, 40), (7, 1), (64, 2), (1, 1)]
    with torch.no_grad():
        for size in sizes:
            fast(torch.zeros(size, dtype=torch.long), use_cache=False)
    assert counters["stats"]["unique_graphs"] - before == graphs
