"""Every architecture of transformers in a tiny size: computed as its own module does, or refused by name?

    python -m experiments.models [--write docs/models.md] [NAME ...]

Prints the table of docs/models.md, or of the named models; `--write` replaces it in that file. Exit status 1 if a model is computed
wrongly.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

from attnstore.command_line import CommandParser
from attnstore.option_types import file_to_write
from experiments.models.table import Row, as_markdown, make_row, replaced
from experiments.models.tiny import names


def main() -> None:
    """Runs the command."""
    parser = CommandParser(prog="experiments.models", description=__doc__)
    parser.add_argument("--write", type=file_to_write, metavar="FILE", help="the page whose table is replaced")
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures and variants (default: all)")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # so that the last bits do not depend on the machine
    rows: list[Row] = []
    wrong = False
    for name in options.names or names():
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows.append(make_row(name, Path(folder)))
            except AssertionError as error:
                wrong = True
                print(error, file=sys.stderr)
    print(as_markdown(rows), end="")
    if wrong:
        sys.exit(1)
    if options.write is not None:
        options.write.write_text(replaced(options.write.read_text(), rows))


if __name__ == "__main__":
    main()
