"""Calls train.py's main once for each argument list of a JSON file; torchrun starts this."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

sys.modules["matplotlib"] = None  # as if it were not there: curves take longer than these runs
import train  # noqa: E402

# Joining torchrun's group a second time would meet the keys of the first: stay in it between runs.
stop, train.distributed.stop = train.distributed.stop, lambda: None

for arguments in json.loads(Path(sys.argv[1]).read_text()):
    code = train.main(arguments)
    if code:
        sys.exit(code)
stop()
