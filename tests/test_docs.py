"""README and docs/: links lead somewhere, variables and logs are those of the source, the picture is of this code."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import weight_to_kernel
from benchmarks.readme import ROOT
from passes import PASSES

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PACKAGES = ("patch_compiler", "passes", "codegen", "learning")
ENVIRONMENT = (DOCS / "environment.md").read_text(encoding="utf-8")


def without_code(markdown: str) -> str:
    return re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)


def heading_anchor(heading: str) -> str:
    """As GitHub makes it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = without_code(page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {heading_anchor(h) for h in headings} | set(re.findall(r'<a id="([^"]+)">', text))


def broken_links(page: Path) -> list[str]:
    """Relative links of a page whose file or anchor does not exist."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        inside = ROOT in (there, *there.parents) or page.parent == there.parent
        if not there.exists() or not inside or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n[1](#a-b-c) [2](#d) [3](nothing.md) [4](page.md#a-b-c) [5](https://x.org)\n", encoding="utf-8")
    assert broken_links(page) == ["#d", "nothing.md"]


def test_every_page_is_linked_from_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in DOCS.glob("*.md") if f"(docs/{p.name}" not in readme] == []


def test_the_passes_stand_in_their_order() -> None:
    listed = re.findall(r"^\d\. \[`(\w+)`\]\(\.\./passes/", (DOCS / "how-it-works.md").read_text("utf-8"), re.M)
    assert listed == [run.__module__.removeprefix("passes.") for run in PASSES]


def test_the_picture_is_drawn_by_this_code() -> None:
    drawn = (ROOT / weight_to_kernel.PICTURE).read_text(encoding="utf-8")
    assert drawn == weight_to_kernel.picture(), "run make docs"


def test_the_picture_has_all_slabs_once() -> None:
    slabs = weight_to_kernel.slab_map(weight_to_kernel.small_map())
    work = weight_to_kernel.segments(slabs)
    assert sum(s.dense for s in work) == int(slabs.dense_slabs.sum())
    assert sum(s.sparse for s in work) == slabs.sparse_slabs
    assert {s.parts > 1 for s in work} == {True, False}  # it shows a panel that is shared and one that is not


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def variables_read(source: str) -> set[str]:
    """Names that Python code asks the environment for. ValueError for one that is not written out."""

    def is_environ(node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    found = set()
    for node in ast.walk(ast.parse(source)):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            asks = is_environ(node.func.value) and node.func.attr in ("get", "setdefault", "pop")
            key = node.args[0] if asks or node.func.attr == "getenv" else None
        elif isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            key = node.slice
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            key = node.left
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.add(key.value)
        elif key is not None:
            raise ValueError(f"line {key.lineno}: the name of an environment variable must be written out")
    return found


def rows_below(heading: str) -> set[str]:
    """Names in the first column of the first table after a line that begins like this."""
    after = ENVIRONMENT.split(heading, 1)[1]
    table = re.search(r"(?:^\|.*\n)+", after, re.M)
    assert table is not None
    rows = table.group().splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([A-Z_0-9]+)`", row.split("|")[1])}


def test_environment_variables_of_the_source() -> None:
    read = {name for path in sources(*PACKAGES, "benchmarks", "tests") for name in variables_read(path.read_text("utf-8"))}
    of_others = {"PATH"}  # tests hand it on to processes that they start
    assert rows_below("## What this project reads") == read - of_others


def test_environment_variables_of_make_and_slurm() -> None:
    makefile, slurm = (ROOT / "Makefile").read_text("utf-8"), (ROOT / "learning/training/slurm/learn.sbatch").read_text("utf-8")
    assert rows_below("Of `make`") == set(re.findall(r"^(\w+) \?=", makefile, re.M))
    assert rows_below("Of [`learning") == {v for v in re.findall(r"\$\{(\w+):-", slurm) if not v.startswith("SLURM_")}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ('os.environ.get("A") or os.environ["B"]', {"A", "B"}),
        ('os.getenv("C", 1); os.environ.setdefault("D", "1")', {"C", "D"}),
        ('"E" in os.environ; os.environ["F"] = "1"; os.environ | {"G": 1}', {"E"}),
    ],
)
def test_variables_are_found(code: str, names: set[str]) -> None:
    assert variables_read(code) == names


def test_a_name_that_is_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="line 1"):
        variables_read('os.environ.get("A" + x)')


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("TRITON_CACHE_DIR", "triton/knobs.py"),
        ("CC", "triton/knobs.py"),
        ("TORCHINDUCTOR_CACHE_DIR", "torch/_inductor/runtime/cache_dir_utils.py"),
    ],
)
def test_caches_of_others_are_named_as_they_name_them(name: str, module: str) -> None:
    assert name in rows_below("## What others read")
    package = Path(importlib.import_module(module.partition("/")[0]).__file__ or "").parents[1]
    assert f'"{name}"' in (package / module).read_text("utf-8")


def test_logs_of_the_source() -> None:
    """Every logger is covered by a name on the page, and every name of ours covers a logger."""
    loggers = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources(*PACKAGES)
        if "getLogger(__name__)" in path.read_text("utf-8")
    }
    names = re.findall(r'^\| `"([\w.]+)"`', ENVIRONMENT, re.M)
    ours = [name for name in names if name.partition(".")[0] in PACKAGES]
    covered = {name: {x for x in loggers if x == name or x.startswith(f"{name}.")} for name in ours}
    assert set().union(*covered.values()) == loggers
    assert all(covered.values())
