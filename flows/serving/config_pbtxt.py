# mypy: disable-error-code="import-untyped"
"""config.pbtxt, made from the program's graph and checked as a protobuf message, never written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import json_format, text_format
from google.protobuf.text_format import ParseError
from tritonclient.grpc.model_config_pb2 import ModelConfig

from flows.config.serving import EntryConfig, ExportConfig
from flows.export.runtime import ProgramError
from flows.serving.repository import model_names

__all__ = ["ModelConfig", "ParseError", "parse", "read_graph", "scores_config", "signature", "text_config", "to_text"]

WARMUP_TOKENS = 8
"""Length of the requests with which the server warms up."""
DATA_TYPES: dict[int, str] = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}
PROGRAM_INPUTS = {"input_ids", "attention_mask"}
PROGRAM_OUTPUTS = {"logits"}


@dataclass(frozen=True)
class Tensor:
    """An input or output of a served model; `dims` leave out the batch, -1 = any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def as_config(self, **more: Any) -> dict[str, Any]:
        """The tensor as a ModelInput or ModelOutput."""
        optional = {"optional": True} if self.optional else {}
        return {"name": self.name, "dataType": self.data_type, "dims": list(self.dims), **optional, **more}


TEXT_INPUTS = (
    Tensor("text_input", "TYPE_STRING", (1,), optional=True),
    Tensor("input_ids", "TYPE_INT64", (-1,), optional=True),
    Tensor("max_tokens", "TYPE_INT32", (1,), optional=True),
    Tensor("temperature", "TYPE_FP32", (1,), optional=True),
    Tensor("top_k", "TYPE_INT32", (1,), optional=True),
    Tensor("top_p", "TYPE_FP32", (1,), optional=True),
    Tensor("repetition_penalty", "TYPE_FP32", (1,), optional=True),
    Tensor("seed", "TYPE_INT64", (1,), optional=True),
    Tensor("stop", "TYPE_STRING", (-1,), optional=True),
    Tensor("timeout_ms", "TYPE_INT32", (1,), optional=True),
    Tensor("stream", "TYPE_BOOL", (1,), optional=True),
    Tensor("log_probabilities", "TYPE_BOOL", (1,), optional=True),
    Tensor("top_log_probabilities", "TYPE_INT32", (1,), optional=True),
    Tensor("prompt_log_probabilities", "TYPE_BOOL", (1,), optional=True),
    Tensor("embedding", "TYPE_BOOL", (1,), optional=True),
)
TEXT_OUTPUTS = (
    Tensor("text_output", "TYPE_STRING", (1,)),
    Tensor("finish_reason", "TYPE_STRING", (1,)),
    Tensor("prompt_tokens", "TYPE_INT32", (1,)),
    Tensor("completion_tokens", "TYPE_INT32", (1,)),
    Tensor("token_ids", "TYPE_INT64", (-1,)),
    Tensor("log_probabilities", "TYPE_FP32", (-1,)),
    Tensor("top_token_ids", "TYPE_INT64", (-1, -1)),
    Tensor("top_log_probabilities", "TYPE_FP32", (-1, -1)),
    Tensor("prompt_token_ids", "TYPE_INT64", (-1,)),
    Tensor("prompt_places", "TYPE_INT32", (-1,)),
    Tensor("prompt_log_probabilities", "TYPE_FP32", (-1,)),
    Tensor("prompt_log_probability", "TYPE_FP32", (1,)),
    Tensor("prompt_top_token_ids", "TYPE_INT64", (-1, -1)),
    Tensor("prompt_top_log_probabilities", "TYPE_FP32", (-1, -1)),
    Tensor("embedding", "TYPE_FP32", (-1,)),
)


def read_graph(program: Sequence[Path]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of an ONNX program's first part and outputs of its last one, the batch dimension left out.

    Raises:
        ProgramError: They are not `input_ids`, `attention_mask` [batch, length] and `logits` [batch, vocabulary].
    """
    first, last = (onnx.load(part, load_external_data=False).graph for part in (program[0], program[-1]))
    inputs, outputs = [_tensor(value) for value in first.input], [_tensor(value) for value in last.output]
    names = " to ".join(str(part) for part in dict.fromkeys((program[0], program[-1])))
    if {tensor.name for tensor in inputs} != PROGRAM_INPUTS or any(tensor.dims != (-1,) for tensor in inputs):
        raise ProgramError(f"{names} has inputs {inputs}; needed are {sorted(PROGRAM_INPUTS)} of [batch, length].")
    if {tensor.name for tensor in outputs} != PROGRAM_OUTPUTS or len(outputs[0].dims) != 1 or outputs[0].dims[0] < 1:
        raise ProgramError(f"{names} has outputs {outputs}; needed is logits of [batch, vocabulary size].")
    return inputs, outputs


def needs_our_model(config: ExportConfig) -> bool:
    """Whether the ONNX backend cannot serve the scores on any server: it reads one file, and cannot decrypt it."""
    return config.encrypt_weights or config.pipeline_stages > 1


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in DATA_TYPES:
        found = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise ProgramError(f"{value.name} is {found}; int64 or float is needed.")
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return Tensor(value.name, DATA_TYPES[kind.elem_type], dims[1:])


def scores_config(
    config: EntryConfig, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, embedded: bool
) -> ModelConfig:
    """How the scores model is served: by the ONNX backend, or by the python backend on the embedded server."""
    if embedded:  # models/scores.py merges requests of different lengths; the ONNX backend batches equal ones only
        backend: dict[str, Any] = {"backend": "python"}
        input_configs = [tensor.as_config(allowRaggedBatch=True) for tensor in inputs]
    else:
        backend = {"backend": "onnxruntime", "defaultModelFilename": "model.onnx"}
        if config.export.threads:
            backend["parameters"] = {"intra_op_thread_count": {"stringValue": str(config.export.threads)}}
        input_configs = [tensor.as_config() for tensor in inputs]
    warmup = [
        {
            "name": f"batch_{size}",
            "batchSize": size,
            "count": 1,
            "inputs": {
                "input_ids": {"dataType": "TYPE_INT64", "dims": [WARMUP_TOKENS], "zeroData": True},
                "attention_mask": {
                    "dataType": "TYPE_INT64",
                    "dims": [WARMUP_TOKENS],
                    "inputDataFile": f"ones_{WARMUP_TOKENS}",
                },
            },
        }
        for size in sorted({1, config.export.max_batch_size})
    ]
    return _message(
        {
            "name": config.model_name,
            **backend,
            "maxBatchSize": config.export.max_batch_size,
            "input": input_configs,
            "output": [tensor.as_config() for tensor in outputs],
            "versionPolicy": {"latest": {"numVersions": config.keep_versions}},
            "dynamicBatching": {"maxQueueDelayMicroseconds": config.export.max_queue_delay_us},
            "instanceGroup": [{"count": config.export.instances, **({"kind": "KIND_CPU"} if embedded else {})}],
            "modelWarmup": warmup,
        }
    )


def text_config(config: EntryConfig) -> ModelConfig:
    """How the text model is served: by the python backend, on the CPU, on every server.

    It batches by itself, token by token, and answers when it likes (decoupled).
    """
    return _message(
        {
            "name": model_names(config.model_name)[1],
            "backend": "python",
            "input": [tensor.as_config() for tensor in TEXT_INPUTS],
            "output": [tensor.as_config() for tensor in TEXT_OUTPUTS],
            "versionPolicy": {"latest": {"numVersions": config.keep_versions}},
            "modelTransactionPolicy": {"decoupled": True},
            "instanceGroup": [{"count": config.export.instances, "kind": "KIND_CPU"}],
        }
    )


def _message(settings: Mapping[str, Any]) -> ModelConfig:
    return json_format.ParseDict(settings, ModelConfig())


def to_text(config: ModelConfig) -> str:
    """The text of config.pbtxt, which parses back to the same message."""
    text: str = text_format.MessageToString(config)
    assert parse(text) == config
    return text


def parse(text: str) -> ModelConfig:
    """The message that config.pbtxt holds.

    Raises:
        ParseError: It is not a model configuration.
    """
    return text_format.Parse(text, ModelConfig())


def signature(config: ModelConfig) -> dict[str, tuple[int, tuple[int, ...], bool]]:
    """Type, dimensions and optionality of every input and output by name: what clients rely on."""
    inputs = {f"input {one.name}": (one.data_type, tuple(one.dims), one.optional) for one in config.input}
    return inputs | {f"output {one.name}": (one.data_type, tuple(one.dims), False) for one in config.output}
