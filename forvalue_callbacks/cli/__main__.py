"""`python -m forvalue_callbacks.cli`, where scripts are not on the path."""

import sys

from . import main

sys.exit(main())
