"""Build the two texts that ship in learning/texts: calibration and held-out.

    python benchmarks/quality/make_texts.py SOURCES OUT

SOURCES holds novels_train.txt.xz, wiki_leads.txt.xz and enwiki_sample.txt.xz: documents separated by two blank lines.
The same sources give the same two files, byte for byte. Nothing is drawn at random.
"""

from __future__ import annotations

import argparse
import lzma
import re
from pathlib import Path

SEPARATOR = "\n\n\n"
CALIBRATION_CHARS = 1_400_000  # 128 windows of 2048 tokens need about 1.2 million characters of English
HELDOUT_CHARS = 400_000
NGRAM = 10  # words; no run of ten words may stand in both texts
EXCERPT_CHARS = 6_000
ARTICLE_CHARS = 12_500
# How a novel's section begins in the source, and how many characters of it are surely that novel
NOVELS = {
    "CLARA VAUGHAN": 240_000,
    "SPRINGHAVEN": 160_000,
    "Jane Eyre": 110_000,
    "SHIRLEY": 300_000,
    "VILLETTE": 160_000,
    "BLEAK HOUSE": 320_000,
    "The Ambassadors": 200_000,
    "THE LIGHT THAT FAILED": 170_000,
    '"MY NOVEL."': 400_000,
    "THE WATER OF THE WONDROUS ISLES": 240_000,
    "THE VIRGINIANS": 320_000,
}


def read_documents(path: Path) -> list[str]:
    text = lzma.decompress(path.read_bytes()).decode()
    return [d.strip() for d in text.split(SEPARATOR) if d.strip()]


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def spread(items: list[str], budget: int) -> list[str]:
    """Items at even distances, as many as fit into the budget of characters."""
    step = max(1.0, sum(map(len, items)) / budget)
    return [items[int(i * step)] for i in range(int(len(items) / step))]


def heldout_documents(articles: list[str]) -> list[str]:
    """The beginning of long articles, cut at the end of a paragraph that ends a sentence."""
    documents = []
    for article in articles:
        if len(article) < ARTICLE_CHARS:
            continue
        paragraphs = article[:ARTICLE_CHARS].split("\n\n")[:-1]
        while paragraphs and not paragraphs[-1].endswith((".", '."', "!", "?")):
            paragraphs.pop()
        documents.append("\n\n".join(paragraphs))
    return spread(documents, HELDOUT_CHARS)


def novel_excerpts(sections: list[str], forbidden: set[tuple[str, ...]]) -> list[str]:
    """Excerpts of whole sentences at even distances, the same number of characters from each novel."""
    excerpts = []
    for title, usable in NOVELS.items():
        section = next((s[:usable] for s in sections if s.startswith(title)), None)
        if section is None:
            raise SystemExit(f"no section of the novels begins with {title!r}")
        count = CALIBRATION_CHARS // 2 // len(NOVELS) // EXCERPT_CHARS + 1
        for i in range(count):
            piece = section[i * len(section) // count :][:EXCERPT_CHARS]
            sentences = [m.end() for m in re.finditer(r"[.!?][\"'”’]?\s", piece)]
            piece = re.sub(r"\n{3,}", "\n\n", piece[sentences[0] : sentences[-1]].replace("\f", " ").strip())
            if not ngrams(piece) & forbidden:
                excerpts.append(piece)
    return excerpts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()

    heldout = heldout_documents(read_documents(args.sources / "enwiki_sample.txt.xz"))
    forbidden = set().union(*map(ngrams, heldout))
    titles = {d.split("\n", 1)[0] for d in heldout}
    leads = [
        lead
        for lead in read_documents(args.sources / "wiki_leads.txt.xz")
        if len(lead) >= 400 and lead.split("\n", 1)[0] not in titles and not ngrams(lead) & forbidden
    ]
    leads = spread(leads, CALIBRATION_CHARS // 2)
    novels = novel_excerpts(read_documents(args.sources / "novels_train.txt.xz"), forbidden)
    per_novel = len(leads) / len(novels)
    calibration = []
    for i, excerpt in enumerate(novels):
        calibration += [excerpt, *leads[int(i * per_novel) : int((i + 1) * per_novel)]]

    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in (("calibration", calibration), ("heldout", heldout)):
        raw = SEPARATOR.join(documents).encode()
        packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
        (args.out / f"{name}.txt.xz").write_bytes(packed)
        print(f"{name}: {len(documents)} documents, {len(raw):,} bytes, {len(packed):,} compressed")
    shared = forbidden & set().union(*map(ngrams, calibration))
    print(f"{NGRAM}-grams in both: {len(shared)}")
    if shared:
        raise SystemExit("the texts overlap")


if __name__ == "__main__":
    main()
