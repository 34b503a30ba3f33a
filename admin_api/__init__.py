"""The admin REST service, the node that serves everything on one port, and the `avb` command line."""
