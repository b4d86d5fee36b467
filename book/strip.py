"""Strip outputs and stray metadata from every notebook of the book."""

from pathlib import Path

from notebooks import read, strip, text_of, write


def strip_folder(folder: Path) -> list[Path]:
    """Rewrite the notebooks that are not stripped; return their paths."""
    paths = sorted(folder.glob("*.ipynb"))
    changed = [path for path in paths if not is_stripped(path)]
    for path in changed:
        write(strip(read(path)), path)
    return changed


def is_stripped(path: Path) -> bool:
    """Whether stripping would leave the file as it is, to the letter."""
    return path.read_text(encoding="utf-8") == text_of(strip(read(path)))


if __name__ == "__main__":
    for stripped in strip_folder(Path(__file__).parent):
        print(f"stripped {stripped.name}")
