"""The plain text of a Bible in SWORD format, one paragraph a line: the second evaluation text of `quality.py`.

    apt-get download sword-text-web && dpkg -x sword-text-web_*.deb web
    python bench/sword_text.py web/usr/share/sword web.txt

Debian's sword-text-web is the World English Bible, in the public domain. A zText module is two files a testament:
`.bzz` holds zlib blocks (here one a book) and `.bzs` twelve bytes for each: offset, compressed size and size,
little-endian. The markup is OSIS: of it only paragraphs and lines of verse are kept, notes and headings go.
"""

from __future__ import annotations

import argparse
import html
import pathlib
import re
import struct
import sys
import zlib

NOTES = re.compile(r"<(note|title)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
BREAKS = re.compile(r"<(?:div|l|lg|chapter)\b[^>]*>|</(?:l|lg)>")
TAGS = re.compile(r"<[^>]*>")
LOOSE = re.compile(r" ([,.;:!?’”)])")  # a note stood between a word and its comma


def blocks(folder: pathlib.Path):
    """The OSIS text of each block of a module, Old Testament first."""
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        data = (folder / f"{testament}.bzz").read_bytes()
        for offset, compressed, size in struct.iter_unpack("<III", index):
            text = zlib.decompress(data[offset : offset + compressed]) if compressed else b""
            if len(text) != size:
                sys.exit(f"{folder}/{testament}.bzz: {len(text)} bytes where {size} are expected")
            yield text.decode("utf-8")


def paragraphs(osis: str):
    """The paragraphs of a book, from its first chapter on."""
    _, chapter, body = osis.partition("<chapter")
    for part in BREAKS.split(NOTES.sub(" ", chapter + body)):
        text = " ".join(html.unescape(TAGS.sub("", part)).split())
        if text:
            yield LOOSE.sub(r"\1", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sword", type=pathlib.Path, help="a folder with a zText module below it")
    parser.add_argument("out", type=pathlib.Path, help="the UTF-8 text file to write")
    args = parser.parse_args()
    modules = sorted(path.parent for path in args.sword.rglob("ot.bzs"))
    if len(modules) != 1:
        sys.exit(f"{args.sword} has {len(modules)} zText modules below it; name a folder with one")
    books = ["\n".join(paragraphs(block)) for block in blocks(modules[0])]
    text = "\n\n".join(book for book in books if book) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(f"{len(text):,} characters written to {args.out}")


if __name__ == "__main__":
    main()
