"""What the package promises of itself: the parts that these tests import need nothing of LocalStack."""

import subprocess
import sys
from pathlib import Path

PLAIN = ("blocks", "catalog", "disk_format", "faults", "import_tasks", "refusal", "tokens", "volume_files")
PLUGIN = Path(__file__).parents[1]


def test_the_plain_modules_import_the_standard_library_only() -> None:
    code = f"""
import importlib, sys
sys.path.insert(0, {str(PLUGIN)!r})
for name in {PLAIN}:
    importlib.import_module("drsync_localstack." + name)
foreign = {{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names) - {{"__main__"}}
print(sorted(name for name in foreign if not name.startswith("_")))
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("['drsync_localstack']", 0), done.stderr
