"""Start LocalStack in host mode, kept to the loopback interface and to one directory.

No setting of LocalStack 4.12 reaches these two, so they are set here, before its runtime starts:

- its server listens on every interface, whatever host GATEWAY_LISTEN names
  (localstack/runtime/server/twisted.py drops the host);
- S3 keeps its objects in /tmp/localstack-s3-storage, shared by all instances on a machine
  (localstack/services/s3/provider.py has the path as a constant).

start.sh sets the environment and runs this with the Python of .venv-localstack.
"""

import functools
import os
import sys
from pathlib import Path

from localstack.runtime import main as runtime
from localstack.services.s3 import provider as s3
from twisted.internet import endpoints


def main() -> None:
    """Run LocalStack until SIGTERM."""
    if not hasattr(s3, "DEFAULT_S3_TMP_DIR"):
        sys.exit("localstack/serve.py: this LocalStack keeps S3 objects elsewhere; it was written for 4.12.0")
    s3.DEFAULT_S3_TMP_DIR = str(Path(os.environ["FILESYSTEM_ROOT"]) / "s3")
    endpoints.TCP4ServerEndpoint = functools.partial(endpoints.TCP4ServerEndpoint, interface="127.0.0.1")
    runtime.main()


if __name__ == "__main__":
    main()
