"""`python -m polydelta.server` is `polydelta`."""

from polydelta.server.cli import main

main()
