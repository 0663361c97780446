"""`torchrun ... -m rae.cli -- COMMAND`, and `python -m rae.cli`."""

from rae.cli import main

main()
