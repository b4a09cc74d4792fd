# mypy: disable-error-code="no-untyped-call, import-untyped"
"""Scores through system shared memory: ids and scores never travel, only the names of where they are."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

import numpy as np
import tritonclient.grpc  # has no types
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, shared_memory

from flows.serving.client import TIMEOUT_S, Client, Transport

IN_USE = "currently in use"
POLL_INTERVAL_S = 0.001


class SharedMemoryClient(Client):
    """A connection to a server on this machine that lets this client register memory; use it from one thread.

    Args:
        address: `host:port` of gRPC.
        headers: What opens registration where the server keeps it closed.
    """

    def __init__(self, address: str, headers: Mapping[str, str]) -> None:
        super().__init__(Transport.grpc, address)
        self.transport = Transport.shared_memory
        self._headers = dict(headers)
        self._vocab_sizes: dict[str, int] = {}

    def scores(
        self, model: str, ids_BL: NDArray[np.int64], mask_BL: NDArray[np.int64], version: str = ""
    ) -> NDArray[np.float32]:
        """See `Client.scores`. Leaves no memory behind, here or on the server."""
        shape_BV = (len(ids_BL), self._vocab_size(model))
        sizes = {"input_ids": ids_BL.nbytes, "attention_mask": mask_BL.nbytes, "logits": 4 * shape_BV[0] * shape_BV[1]}
        name = f"millrace-client-{secrets.token_hex(8)}"
        region = shared_memory.create_shared_memory_region(name, f"/{name}", sum(sizes.values()), create_only=True)
        try:
            shared_memory.set_shared_memory_region(region, [ids_BL, mask_BL])
            self._client.register_system_shared_memory(
                name, f"/{name}", sum(sizes.values()), headers=self._headers, client_timeout=TIMEOUT_S
            )
            try:
                inputs, offset = [], 0
                for tensor in sizes:
                    if tensor == "logits":
                        output = tritonclient.grpc.InferRequestedOutput(tensor)
                        output.set_shared_memory(name, sizes[tensor], offset)
                    else:
                        inputs.append(tritonclient.grpc.InferInput(tensor, list(ids_BL.shape), "INT64"))
                        inputs[-1].set_shared_memory(name, sizes[tensor], offset)
                    offset += sizes[tensor]
                self._client.infer(model, inputs, version, [output], client_timeout=TIMEOUT_S)
            finally:
                self._unregister(name)
            start = sizes["input_ids"] + sizes["attention_mask"]
            logits_BV: NDArray[np.float32] = shared_memory.get_contents_as_numpy(region, np.float32, shape_BV, start)
            return logits_BV.copy()
        finally:
            shared_memory.destroy_shared_memory_region(region)

    def _unregister(self, name: str) -> None:
        """The server lets go of a region a moment after it has sent the answer, and refuses until then."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self._client.unregister_system_shared_memory(name, headers=self._headers, client_timeout=TIMEOUT_S)
                return
            except InferenceServerException as error:
                if IN_USE not in str(error.message()) or time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL_S)

    def _vocab_size(self, model: str) -> int:
        if model not in self._vocab_sizes:
            (logits,) = self._client.get_model_metadata(model).outputs
            self._vocab_sizes[model] = int(logits.shape[-1])
        return self._vocab_sizes[model]
