"""Records -> one HTML file that opens offline and loads nothing.

The rows are data of the page, compressed and in base64, so no text of theirs can end the script
element that holds them or become markup. The content security policy of the page allows its own
script and style, named by their hashes, and nothing else: no request, no other script.
"""

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = ("elements.js", "differences.js", "row.js", "histograms.js", "page.js")


def make_page(title: str, content: Mapping[str, Any]) -> str:
    """The page of `content`, which page.js documents."""
    page, style, *scripts = (
        files("notus.look").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n".join(scripts)
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packed = gzip.compress(data.encode("utf-8", "replace"), mtime=0)
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "TITLE": html.escape(title),
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "DATA": base64.b64encode(packed).decode(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _source(text: str) -> str:
    """A script or style as the policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
