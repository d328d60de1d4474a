#!/usr/bin/env python3
"""Builds text for calibration and for evaluation out of Debian's package `fortunes`.

    calibration_text.py OUT_DIR

Writes calibration.txt and evaluation.txt (passages, a blank line between them), and
calibration_sentences.txt and evaluation_sentences.txt (one sentence a line, for encoders). The two
parts share no passage, and their order is that of the passages' hashes, so every run on the same
package gives the same files.
"""

import argparse
import hashlib
import pathlib
import re
import sys

FORTUNES = pathlib.Path("/usr/share/games/fortunes")
NO_PROSE = {"ascii-art"}
# Of ten passages, two are for evaluation.
EVALUATION_TENTHS = 2
# A line of so many characters goes on in the next one, unless that begins with a space or a dash.
FULL_LINE = 55


def passages(directory):
    """Every passage of the package, as it stands in the files."""
    files = sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and not path.is_symlink()
        and path.suffix == ""
        and path.name not in NO_PROSE
    )
    for path in files:
        for entry in re.split(r"^%\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if entry.strip():
                yield entry


def unwrap(entry):
    """Joins lines that were only wrapped at the page's width; drops terminal control characters."""
    entry = re.sub(r".\x08", "", entry).expandtabs(2)
    entry = "".join(c for c in entry if c == "\n" or c.isprintable())
    lines = []
    previous_is_full = False
    for line in entry.split("\n"):
        text = line.rstrip()
        if previous_is_full and re.match(r"[^\s\-]", text):
            lines[-1] += " " + text
        else:
            lines.append(text)
        previous_is_full = len(text) >= FULL_LINE
    return "\n".join(lines).strip()


def sentences(entry):
    """Whole sentences of a passage that an encoder may be fed with."""
    for sentence in re.split(r"(?<=[.!?])\s+", entry.replace("\n", " ")):
        sentence = " ".join(sentence.split())
        if (
            not sentence.startswith("--")
            and 20 <= len(sentence) <= 300
            and len(sentence.split()) >= 4
        ):
            yield sentence


def digest(entry):
    """Equal for passages that differ in spaces, case and punctuation alone."""
    return hashlib.sha256(re.sub(r"\W+", "", entry).lower().encode()).hexdigest()


def write(path, lines, separator):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(separator.join(lines) + "\n", encoding="utf-8")
    partial.rename(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=pathlib.Path)
    parser.add_argument("--fortunes", type=pathlib.Path, default=FORTUNES)
    options = parser.parse_args()
    if not options.fortunes.is_dir():
        sys.exit(
            f"calibration_text.py: {options.fortunes}: no such directory; is the package "
            "fortunes installed?"
        )

    by_digest = {digest(entry): unwrap(entry) for entry in passages(options.fortunes)}
    parts = {"calibration": [], "evaluation": []}
    for key in sorted(by_digest):
        # The order is by the leading digits of the hash, so the part is by its last ones.
        is_evaluation = int(key[-8:], 16) % 10 < EVALUATION_TENTHS
        parts["evaluation" if is_evaluation else "calibration"].append(by_digest[key])
    if not all(parts.values()):
        sys.exit(f"calibration_text.py: {options.fortunes}: holds too little text")

    options.out_dir.mkdir(parents=True, exist_ok=True)
    seen = set()
    for part, entries in parts.items():
        write(options.out_dir / f"{part}.txt", entries, "\n\n")
        lines = []
        for sentence in (s for entry in entries for s in sentences(entry)):
            if digest(sentence) not in seen:
                seen.add(digest(sentence))
                lines.append(sentence)
        write(options.out_dir / f"{part}_sentences.txt", lines, "\n")


if __name__ == "__main__":
    main()
