"""`python -m micromix_compile.integrations serve DIR`: the command line of transformers, which then knows our format."""

from __future__ import annotations

import sys


def main() -> None:
    from transformers.cli.transformers import main as transformers

    import micromix_compile  # noqa: F401  registers the quantisation method

    sys.argv[0] = "transformers"
    transformers()


if __name__ == "__main__":
    main()
