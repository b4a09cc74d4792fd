# mypy: disable-error-code="import-not-found, import-untyped"
"""A program's session on onnxruntime."""

from pathlib import Path

import onnxruntime

from .encryption import SUFFIX, decrypt, find


def open_session(program: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU, set up alike wherever candidates are measured and served.

    Args:
        program: ONNX file; an encrypted one beside its name is decrypted in memory.
        threads: Threads of one request; 0 = the runtime's choice.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # idle threads of one program must not burn the cores that another one, or the server, needs
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not has_vnni():  # sums of two 8-bit products overflow 16 bits there; this asks for the exact, slower way
        options.add_session_config_entry("session.x64quantprecision", "1")
    place = find(program) or program
    source = decrypt(place) if place.name.endswith(SUFFIX) else str(place)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def has_vnni() -> bool:
    """Whether this x86 processor multiplies 8-bit integers without overflow."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_vnni" in flags or "avx_vnni" in flags
