"""`python -m agentvoicebox.admin_api.cli` is `avb`."""

import sys

from agentvoicebox.admin_api.cli import main

sys.exit(main())
