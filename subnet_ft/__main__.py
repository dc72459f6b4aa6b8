"""`python -m subnet_ft` is `subnet-ft`."""

import sys

from subnet_ft.cli import main

sys.exit(main())
