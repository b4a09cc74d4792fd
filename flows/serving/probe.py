"""Whether a server really infers, by asking it: what it says of itself stays "ready" with dead models.

    python3 probe.py 127.0.0.1:8000 60 quickstart quickstart_text

Imports nothing but the standard library, so that it can be carried into a container, which calls it.
"""

from __future__ import annotations

import json
import math
import sys
import urllib.error
import urllib.request
from typing import Any

BUSY = 503
"""Status with which the text model refuses when enough texts wait: it lives."""
TEXT_INPUT = "text_input"


def infer(address: str, model: str, timeout_s: float) -> None:
    """Returns once a model has answered, or has refused because it is busy.

    Args:
        address: `host:port` of the server's HTTP endpoint.
        model: Name of a scores model or a text model.
        timeout_s: Of each of the two requests.

    Raises:
        OSError: It does not answer, or fails.
    """
    place = f"http://{address}/v2/models/{model}"
    with urllib.request.urlopen(place, timeout=timeout_s) as response:
        inputs = json.loads(response.read())["inputs"]
    try:
        if TEXT_INPUT in [one["name"] for one in inputs]:
            _post(f"{place}/generate", {TEXT_INPUT: "a", "max_tokens": 1}, timeout_s)
        else:
            _post(f"{place}/infer", {"inputs": [_ones(one) for one in inputs]}, timeout_s)
    except urllib.error.HTTPError as error:
        if error.code != BUSY:
            raise


def _ones(one: dict[str, Any]) -> dict[str, Any]:
    shape = [max(1, size) for size in one["shape"]]
    return {"name": one["name"], "datatype": one["datatype"], "shape": shape, "data": [1] * math.prod(shape)}


def _post(url: str, body: dict[str, Any], timeout_s: float) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        response.read()


def main(address: str, timeout_s: str, *models: str) -> int:
    """Exit code 0 if every model infers."""
    for model in models:
        try:
            infer(address, model, float(timeout_s))
        except (OSError, ValueError) as error:
            print(f"{model} does not infer: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
