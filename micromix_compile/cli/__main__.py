"""`python -m micromix_compile.cli`: the command `micromix`."""

import sys

from micromix_compile.cli import main

sys.exit(main())
