"""Whether the server in this container answers /health with 200; the exit code says so."""

from __future__ import annotations

import http.client
import os
import sys

# Not urllib, which asks the proxy that the environment names.
connection = http.client.HTTPConnection(
    "127.0.0.1", int(os.environ.get("POLYDELTA_PORT", "8000")), timeout=4
)
try:
    connection.request("GET", "/health")
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"/health: {error!r}")
if status != 200:
    sys.exit(f"/health: status {status}")
