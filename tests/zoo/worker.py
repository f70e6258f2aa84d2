"""One process of the zoo: ``worker.py RECORDS FOLDER NAME...`` appends a JSON line for each; --list says the names."""

import json
import sys
import warnings
from pathlib import Path

import check
import torch


def main() -> None:
    if sys.argv[1] == "--list":
        sys.stdout.write("\n".join(check.names()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out, folder = Path(sys.argv[1]), None if sys.argv[2] == "-" else Path(sys.argv[2])
    quick = "--quick" in sys.argv
    for name in (n for n in sys.argv[3:] if n != "--quick"):
        record = check.examine(name, folder, quick)
        with out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
