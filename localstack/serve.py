"""Start LocalStack in host mode, kept to the loopback interface and to one directory.

No setting of LocalStack 4.12 reaches these, so they are set here, before its runtime starts:

- its server listens on every interface, whatever host GATEWAY_LISTEN names
  (localstack/runtime/server/twisted.py drops the host);
- S3 keeps its objects in /tmp/localstack-s3-storage, shared by all instances on a machine
  (localstack/services/s3/provider.py has the path as a constant);
- KMS makes no symmetric key on a Python before 3.12: it gives bytes to uuid.uuid5, which takes them from then on
  (localstack/services/kms/models.py).

start.sh sets the environment and runs this with the Python of .venv-localstack.
"""

import functools
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

from localstack.runtime import main as runtime
from localstack.services.kms import models as kms
from localstack.services.s3 import provider as s3
from twisted.internet import endpoints


def key_material_id(key: Any, material: bytes) -> str:
    """64 hex digits that tell one material of a KMS key from another, as LocalStack's own do."""
    return hashlib.sha256(key._internal_key_id.bytes + material).hexdigest()


def main() -> None:
    """Run LocalStack until SIGTERM."""
    if not hasattr(s3, "DEFAULT_S3_TMP_DIR"):
        sys.exit("localstack/serve.py: this LocalStack keeps S3 objects elsewhere; it was written for 4.12.0")
    s3.DEFAULT_S3_TMP_DIR = str(Path(os.environ["FILESYSTEM_ROOT"]) / "s3")
    kms.KmsKey.generate_key_material_id = key_material_id
    endpoints.TCP4ServerEndpoint = functools.partial(endpoints.TCP4ServerEndpoint, interface="127.0.0.1")
    runtime.main()


if __name__ == "__main__":
    main()
