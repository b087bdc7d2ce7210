"""python -m benchmarks SUBJECT [options]: hands over to the main(argv) of benchmarks/SUBJECT.py.

Subjects: lora_linear, lora_linear_clients, truncated_svd, federated_round, compile_check; dispatch measures which
kernels a GPU takes and writes their table; targets holds the records against the goals; plot writes the README's tables
and the figures.
"""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def subjects() -> list[str]:
    """Modules of this folder that have a main."""
    found = (path for path in FOLDER.glob("*.py") if not path.name.startswith(("_", "test_")))
    return sorted(path.stem for path in found if "\ndef main(" in path.read_text(encoding="utf-8"))


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in subjects():
        print(f"usage: python -m benchmarks {{{','.join(subjects())}}} [options]", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
