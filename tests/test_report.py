"""Tables align, the HTML page is safe and self-contained, and its pictures show the tile maps they stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patch_compiler.explanation import Site
from patch_compiler.heat_map import heat_map, rectangles
from patch_compiler.report import Highlight, Report, Result, Sample, blocks_of, render, split_name, write_report
from patch_compiler.tile_map import TileKind, TileMap

HOSTILE = [
    "model.layers.0.<script>alert(1)</script>",
    'model.layers.1."onload="alert(1)',
    "model.layers.2.{{ 7 * 7 }}</svg></title></style>",
    "model.layers.3.'><img src=https://example.org/x.png>",
    "\x1b[31mred\x07\n",
    "层.0.线性",
]


@st.composite
def tile_maps(draw: st.DrawFn) -> TileMap:
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 70)))
    tile = (draw(st.sampled_from([1, 3, 8, 16, 64])), draw(st.sampled_from([4, 8, 12, 32])))
    seed = draw(st.integers(0, 2**31))
    kinds = draw(st.integers(1, 3))
    grid = TileMap.grid_of(shape, tile)
    return TileMap(shape, tile, torch.randint(0, kinds, grid, generator=torch.Generator().manual_seed(seed)).to(torch.uint8))


def random_map(shape: tuple[int, int], tile: int = 128, dense: float = 0.3) -> TileMap:
    return TileMap.from_dense(shape, torch.rand(TileMap.grid_of(shape, (tile, tile))) < dense, tile)


def site(name: str, tile_map: TileMap | None, runs: str = "packed", reason: str = "because") -> Site:
    shape = (8, 8) if tile_map is None else tile_map.shape
    return Site(name, shape, "bfloat16", tile_map, runs, reason, 2 * shape[0] * shape[1], None if tile_map is None else 77)


class Page(HTMLParser):
    """Elements of a page: (tag, attributes), its text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


@dataclass
class Drawn:
    """An <svg> read back: units of the view box, and per kind how often each unit is covered."""

    width: int
    height: int
    cover: dict[str, torch.Tensor]


def read_svgs(html: str) -> list[Drawn]:
    drawn: list[Drawn] = []
    for tag, attributes in Page(html).elements:
        if tag == "svg":
            width, height = map(int, str(attributes["viewbox"]).split()[2:])
            drawn.append(Drawn(width, height, {}))
        elif tag == "path" and attributes["class"] != "grid":
            drawn[-1].cover[str(attributes["class"])] = _cover(str(attributes["d"]), drawn[-1].height, drawn[-1].width)
    return drawn


def _cover(d: str, height: int, width: int) -> torch.Tensor:
    cover = torch.zeros(height, width, dtype=torch.int64)
    rectangle = re.compile(r"M(\d+) (\d+)h(\d+)v(\d+)h-\3z")
    assert rectangle.sub("", d) == ""
    for x, y, w, h in (map(int, found) for found in rectangle.findall(d)):
        assert x + w <= width
        assert y + h <= height
        cover[y : y + h, x : x + w] += 1
    return cover


# ---- heat maps


@settings(max_examples=60, deadline=None)
@given(tile_maps())
def test_page_draws_every_weight_once_in_its_kind(tile_map: TileMap) -> None:
    (drawn,) = read_svgs(render(Report("t", maps={"model.layers.0.q": tile_map})))
    m, k = tile_map.shape
    unit = k // drawn.width
    assert (drawn.height * unit, drawn.width * unit) == (m, k)
    for kind in TileKind:
        mine = tile_map.kinds == int(kind)
        expected = mine.repeat_interleave(tile_map.tile[0], 0)[:m].repeat_interleave(tile_map.tile[1], 1)[:, :k].long()
        cover = drawn.cover.get(kind.name.lower(), torch.zeros(drawn.height, drawn.width, dtype=torch.int64))
        assert torch.equal(cover.repeat_interleave(unit, 0).repeat_interleave(unit, 1), expected)
        assert int(cover.sum()) * unit**2 == int(tile_map.areas()[mine].sum())


def test_equal_neighbours_become_one_rectangle() -> None:
    tile_map = TileMap.full((576, 1536), TileKind.DENSE)
    assert rectangles(tile_map) == {TileKind.DENSE: [(0, 0, 1536, 576)]}
    tile_map.kinds[2, 3] = int(TileKind.SPARSE24)
    assert len(rectangles(tile_map)[TileKind.DENSE]) == 4  # above, left, right, below
    assert rectangles(tile_map)[TileKind.SPARSE24] == [(384, 256, 128, 128)]


def test_tooltips_count_tiles_and_weights() -> None:
    kinds = torch.tensor([[2, 1], [1, 0]], dtype=torch.uint8)
    tips = [path.tooltip for path in heat_map(TileMap((24, 24), (16, 16), kinds)).paths]
    assert tips == [
        "dense: 1 of 4 tiles, 44.4% of the weights",
        "2:4: 2 of 4 tiles, 44.4% of the weights",
        "zero: 1 of 4 tiles, 11.1% of the weights",
    ]


def test_a_7b_model_stays_below_ten_megabytes() -> None:
    shapes = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    maps = {f"model.layers.{i}.{n}": random_map(s, dense=0.5) for i in range(32) for n, s in shapes.items()}
    html = render(Report("7B", maps=maps, sites=[site(n, m) for n, m in maps.items()]))
    assert len(html.encode()) < 10_000_000
    assert html.count("<svg") == len(maps)


def test_maps_beyond_the_limit_are_listed_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patch_compiler.report.MAP_BYTES_LIMIT", 1)
    html = render(Report("t", maps={f"layers.{i}.q": random_map((64, 64), 16) for i in range(5)}))
    assert html.count("<svg") == 1
    assert "4 layers from <code>layers.1.q</code> on" in html


# ---- the page


def full_report(names: list[str]) -> Report:
    maps = {name: random_map((40 + 8 * i, 72), 16) for i, name in enumerate(names)}
    return Report(
        title=names[0],
        lead=names[1],
        highlights=[Highlight(*names[:3])],
        results=[Result(name, 20.0 + i, 0.1 * i, 90, 100, i == 1) for i, name in enumerate(names)]
        + [Result("", None, 0.5, 1, 2)],
        results_note=names[2],
        samples=[Sample(name, name) for name in names],
        maps=maps,
        sites=[site(name, tile_map, runs=name, reason=name) for name, tile_map in maps.items()] + [site("unmasked", None)],
        provenance={name: name for name in names},
    )


def test_hostile_names_stay_text() -> None:
    page = Page(render(full_report(HOSTILE)))
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "base", "form"})
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    for name in HOSTILE:
        assert name in page.text
    assert "49" not in set(page.text.split()), "a name was run as a template"


def test_page_refers_to_nothing_outside() -> None:
    names = [name for name in HOSTILE if "http" not in name]
    html = render(full_report(names))
    assert re.search(r"https?:|//[a-z]|@import|url\(|src=|href=", html) is None
    assert "default-src 'none'" in html


def test_page_is_the_same_but_for_names() -> None:
    """Escaping changes nothing else: the same elements with hostile names as with plain ones."""
    plain = [re.sub(r"[^\w.]", "a", name) for name in HOSTILE]
    assert plain != HOSTILE

    def tags(names: list[str]) -> list[str]:
        torch.manual_seed(1)  # the same maps: a kind that does not occur has no path
        return [tag for tag, _ in Page(render(full_report(names))).elements]

    assert tags(HOSTILE) == tags(plain)


def test_empty_report_renders() -> None:
    page = Page(render(Report("empty")))
    assert page.open == []
    assert "empty" in page.text
    assert "Tile maps" not in page.text
    assert "Dispatch" not in page.text


def test_numbers_on_the_page() -> None:
    kinds = torch.full((2, 2), int(TileKind.SPARSE24), dtype=torch.uint8)
    half = TileMap((32, 32), (16, 16), kinds)
    report = Report(
        "t",
        results=[Result("dense", 21.6249, 0.0, 2_000_000, 2_000_000), Result("hybrid", 25.5, 0.35, 1_420_000, 2_000_000, True)],
        maps={"model.layers.0.up": half, "model.layers.1.up": TileMap.full((32, 32), TileKind.DENSE, 16)},
        sites=[replace(site("model.layers.0.up", half), dense_bytes=2048, packed_bytes=1156)],
    )
    text = " ".join(Page(render(report)).text.split())
    for expected in ("21.62", "35.0 %", "1.42 MB", "0.710", "linears together: 25.00 %", "0 / 4", "2.05 kB", "1.16 kB", "50.0"):
        assert expected in text


def test_infinite_perplexity_and_zero_bytes_render() -> None:
    results = [Result("a", float("inf"), 0.5, 0, 0), Result("b", float("nan"), 0.5, 0, 0), Result("c", 3.0, 0.1, 1, 2)]
    html = render(Report("t", results=results))
    assert "inf" in html
    widths = [float(width) for width in re.findall(r'style="width:([^%"]+)%', html)]
    assert widths == [100, 0, 0, 0, 100, 50]  # perplexity and bytes of a, b, c; infinity is not what the others are measured by


def test_write_report_replaces_in_one_step(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    assert write_report(path, Report("first")) == path
    with pytest.raises(Exception, match=r"has no attribute"):
        write_report(path, Report("second", results=[object()]))  # type: ignore[list-item]
    assert "<title>first</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


# ---- blocks


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj", ("model.layers.12", "self_attn.q_proj")),
        ("transformer.h.0.mlp.c_fc", ("transformer.h.0", "mlp.c_fc")),
        ("layers.3.experts.7.down", ("layers.3", "experts.7.down")),
        ("classifier", ("", "classifier")),
        ("head.0", ("", "head.0")),
        ("", ("", "")),
    ],
)
def test_split_name(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_figures_stack_without_growing_the_block() -> None:
    rows = dict.fromkeys("qkvo", 4096) | {"gate": 11008, "up": 11008, "down": 4096}
    (block,) = blocks_of({f"layers.0.{name}": random_map((m, 64), 64) for name, m in rows.items()})
    stacks = [[layer.projection for layer in column] for column in block.columns]
    assert stacks == [["q", "k"], ["v", "o"], ["gate"], ["up"], ["down"]]
