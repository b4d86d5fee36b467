"""Write what others compare with: one table of all runs, and the claims.

In: `results/`. Out: `results/ledger.csv`, `results/claims.json`.
"""

from pathlib import Path

from bnnlib import results
from bnnlib.files import atomic_write
from bnnlib.studies.claims import claims_json

FILES = ("ledger.csv", "claims.json")


def contents(folder: Path) -> dict[str, str]:
    """The text of each of `FILES`, from the runs and tables in a folder."""
    table = results(folder)
    texts = table.to_csv(lineterminator="\n"), claims_json(table)
    return dict(zip(FILES, texts, strict=True))


def write(folder: Path) -> None:
    """Write them anew beside the runs."""
    for name, text in contents(folder).items():
        atomic_write(folder / name, text.encode())


if __name__ == "__main__":
    write(Path(__file__).parents[1] / "results")
