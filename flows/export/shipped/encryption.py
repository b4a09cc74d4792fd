# mypy: disable-error-code="import-not-found, import-untyped"
"""Weights at rest: encrypted with AES-256-GCM, decrypted in memory only. The key comes from the environment."""

import hashlib
import hmac
import os
import stat
from pathlib import Path

SUFFIX = ".aesgcm"
KEY, KEY_PATH = "MILLRACE_WEIGHTS_KEY", "MILLRACE_WEIGHTS_KEY_PATH"
NONCE_BYTES = 12


def read_key() -> bytes:
    """The 256-bit key: 64 hexadecimal digits in one variable, or in a file that the other one names.

    Raises:
        RuntimeError: There is none, it is not of that form, or others may read the file.
    """
    text = os.environ.get(KEY)
    if text is None:
        if KEY_PATH not in os.environ:
            raise RuntimeError(f"the weights are encrypted, and neither {KEY} nor {KEY_PATH} is set. Set one of them.")
        path = Path(os.environ[KEY_PATH])
        if not path.is_file():
            raise RuntimeError(f"{KEY_PATH}={path} does not exist. Name the file that holds the key.")
        if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            raise RuntimeError(f"{KEY_PATH}={path} has mode {mode:o}: others may read it. chmod 600 it.")
        text = path.read_text()
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise RuntimeError("the key of the weights must be 64 hexadecimal digits. Make one with: openssl rand -hex 32")
    return key


def key_digest() -> str:
    """Tells keys apart without telling what they are."""
    return hmac.new(read_key(), b"which key", hashlib.sha256).hexdigest()[:16]


def encrypt(path: Path) -> Path:
    """Puts an encrypted file in a file's place and returns it; equal content under one key gives equal bytes."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    key, content = read_key(), path.read_bytes()
    # never one nonce for two contents, which would tell how they differ
    nonce = hmac.new(key, path.name.encode() + b"\0" + content, hashlib.sha256).digest()[:NONCE_BYTES]
    encrypted = path.with_name(path.name + SUFFIX)
    encrypted.write_bytes(nonce + AESGCM(key).encrypt(nonce, content, path.name.encode()))
    path.unlink()
    return encrypted


def decrypt(encrypted: Path) -> bytes:
    """What an encrypted file holds.

    Raises:
        RuntimeError: The key is another one, or the file was changed or renamed.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    content = encrypted.read_bytes()
    try:
        name = encrypted.name.removesuffix(SUFFIX).encode()
        return AESGCM(read_key()).decrypt(content[:NONCE_BYTES], content[NONCE_BYTES:], name)
    except InvalidTag as error:
        raise RuntimeError(f"{encrypted} cannot be decrypted: it was changed, or the key is another one.") from error


def find(program: Path) -> Path | None:
    """A program's file, encrypted or not; None if there is none."""
    places = (program, program.with_name(program.name + SUFFIX))
    return next((path for path in places if path.exists()), None)


def read(path: Path) -> bytes:
    """Content of what `find` found."""
    return decrypt(path) if path.name.endswith(SUFFIX) else path.read_bytes()
