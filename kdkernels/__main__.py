"""Entry point of ``python -m kdkernels``."""

import sys

from kdkernels.cli import main

sys.exit(main())
